"""The run directory and how a run's state is stored in it; nothing outside this package knows either.

    WORKDIR/config.json  tokenizer.model  metrics.jsonl  and TensorBoard events, curves, the log of the program
    WORKDIR/checkpoints/STEP/manifest.json               written last: step, metadata, metric, each file's SHA-256
    WORKDIR/checkpoints/STEP/{parameters,optimizer,…}/   what Orbax wrote for each entry of the state
    WORKDIR/checkpoints/damaged/STEP/                    what was not as written, moved aside when training resumed

Orbax alone restores flipped bits without a word, follows links and names a step before it is saved; so a step counts
here only once its manifest is written, and is read only when every file still matches it. Nothing is unpickled.

    run_directory.py  the files of a run but its state      manifest.py      what a finished checkpoint consists of
    storage.py        Orbax, by entry and by leaf           reader.py        checks and restores
    checkpointer.py   saves in the background, keeps the newest and the best, resumes
"""

from tfm.checkpoint.checkpointer import Checkpointer
from tfm.checkpoint.reader import CheckpointReader
from tfm.checkpoint.run_directory import RunDirectory, truncate_metrics

__all__ = ["CheckpointReader", "Checkpointer", "RunDirectory", "truncate_metrics"]
