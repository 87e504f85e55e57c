"""Train a run, or resume it: the same command again goes on from the newest checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import os

from tfm.commands.options import parse
from tfm.config import Config

_LESS_MEMORY = (
    "run the same command with training.gradient_accumulation=2 (or 4, ...), training.remat=dots (or full), or "
    "mesh.fsdp=N on N devices; a lower training.target_tokens_per_batch takes another --workdir"
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a Transformer, or resume its training."""

    workdir: str
    """Directory of the run: its config, tokenizer, checkpoints and numbers."""
    config: str | None = None
    """Name of a shipped config, or the path of a .py file with get_config(); the run's own if there is one."""


def main(argv: list[str]) -> int:
    arguments, config = parse("train", argv, Arguments)
    deterministic_where_asked(config)
    from tfm import hosts

    with hosts.together(config):
        return trained(config, arguments.workdir)


def deterministic_where_asked(config: Config) -> None:
    """Has XLA use deterministic kernels where the run does; to be called before the first use of a GPU."""
    if config.training.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"


def trained(config: Config, workdir: str) -> int:
    """Trains a run to its end, or to a signal; the exit status."""
    from tfm import device_memory
    from tfm.training.loop import train
    from tfm.training.progress import TrainingDiverged

    what = f"{config.rows_per_batch} rows a batch (training.target_tokens_per_batch) and the state of training"
    try:
        with device_memory.explained(what, _LESS_MEMORY):
            return train(config, workdir)
    except TrainingDiverged as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
