"""How long a run over millions of pairs takes to find its place again, and in how much memory.

    python benchmarks/plan_at_scale.py --pairs=4500000 --step=20000 --directory=DIR

Simulates a token store of that many pairs with sentence lengths like WMT's (log-normal, 27 tokens on average; the
tokens themselves are all the same), in files of DIR that are read memory-mapped, as a real store is. Then it opens the
store as a resumed run does and builds the batch of a step: first counting all windows before it, then, in a fresh
process, with the counts that every checkpoint carries.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tyro

from tfm.config import Config, DataConfig, TrainingConfig
from tfm.data.batches import TrainBatches
from tfm.data.shards import PairTable, Shard

SHARD_PAIRS = 1_000_000
ROW_LENGTH = 256
LONGEST = 200
FILES = {
    "source_lengths": np.uint16,
    "target_lengths": np.uint16,
    "source_offsets": np.uint32,
    "target_offsets": np.uint32,
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the resumption of a run over a simulated corpus."""

    directory: Path
    """Directory for the simulated store's files, 12 bytes a pair."""
    pairs: int = 4_500_000
    """Sentence pairs."""
    step: int = 20_000
    """Step to resume at; batches have 24,576 target tokens."""
    counts: Path | None = None
    """Used within: the counts of windows, as a checkpoint carries them."""


class SimulatedStore:
    """A token store as `TrainBatches` reads it: lengths and offsets are its own, and every token is the same."""

    def __init__(self, arguments: Arguments):
        self.directory = None  # so that nothing is remembered between the processes but what is handed over
        self.corpus_hash = f"simulated {arguments.pairs}"
        files = {name: arguments.directory / f"{name}-{arguments.pairs}" for name in FILES}
        if not all(path.exists() for path in files.values()):
            _simulate(arguments, files)
        columns = {name: np.memmap(files[name], kind, "r") for name, kind in FILES.items()}
        tokens = np.zeros(SHARD_PAIRS * LONGEST, np.uint16)  # never written to, so that it takes no memory
        shards = []
        for start in range(0, arguments.pairs, SHARD_PAIRS):
            part = {name: column[start : start + SHARD_PAIRS] for name, column in columns.items()}
            lengths = {"source": part["source_lengths"], "target": part["target_lengths"]}
            offsets = {"source": part["source_offsets"], "target": part["target_offsets"]}
            used = {side: tokens[: int(offsets[side][-1]) + int(lengths[side][-1])] for side in lengths}
            shards.append(Shard(used, lengths, offsets))
        self._table = PairTable("simulated", 1.0, shards)

    def tables(self, split: str) -> list[PairTable]:
        return [self._table]


def _simulate(arguments: Arguments, files: dict[str, Path]) -> None:
    arguments.directory.mkdir(parents=True, exist_ok=True)
    partial = {name: path.with_name(f"{path.name}.partial") for name, path in files.items()}
    columns = {name: np.memmap(path, FILES[name], "w+", shape=(arguments.pairs,)) for name, path in partial.items()}
    for start in range(0, arguments.pairs, SHARD_PAIRS):
        size = min(SHARD_PAIRS, arguments.pairs - start)
        random = np.random.default_rng(start)
        source = random.lognormal(np.log(23.6), 0.52, size)
        target = source * random.lognormal(0.0, 0.2, size)
        for side, drawn in (("source", source), ("target", target)):
            lengths = np.clip(np.rint(drawn), 2, LONGEST).astype(np.int64)
            columns[f"{side}_lengths"][start : start + size] = lengths
            columns[f"{side}_offsets"][start : start + size] = np.cumsum(lengths) - lengths
    for name, column in columns.items():
        column.flush()
        partial[name].rename(files[name])


def main() -> None:
    arguments = tyro.cli(Arguments)
    store = SimulatedStore(arguments)
    data = DataConfig(source_row_length=ROW_LENGTH, target_row_length=ROW_LENGTH)
    config = Config(data=data, training=TrainingConfig(target_tokens_per_batch=24_576))
    start = time.perf_counter()
    batches = TrainBatches(store, "train", config, remember=False)
    if arguments.counts is not None:
        batches.plan.recall(json.loads(arguments.counts.read_text()))
    batches.host_batch(arguments.step)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    how = "with the checkpoint's counts" if arguments.counts is not None else "counting every window"
    print(
        f"{arguments.pairs:,} pairs, step {arguments.step:,} (epoch {batches.epoch(arguments.step):.2f}), {how}: "
        f"{seconds:.2f} s, peak {peak:.0f} MB resident",
        flush=True,
    )
    if arguments.counts is None:
        counts = arguments.directory / "counts.json"
        counts.write_text(json.dumps(batches.plan.counts()))
        subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--counts={counts}"], check=True)


if __name__ == "__main__":
    main()
