"""What reading real data costs a training step, against stepping over one batch that is there already.

    python benchmarks/input_pipeline.py --config=multi30k --workdir=DIR --data.corpus='text:DIR/{split}.{lang}.gz'

Both kinds of step run in turn, in blocks, in one process, so that a machine whose speed drifts is fair to both. Prints
the median step of each, their ratio, and the CPU seconds that one batch costs to build.
"""

import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from pathlib import Path

import jax

from tfm import sharding
from tfm.commands.options import parse
from tfm.config import InputError
from tfm.data.batches import TrainBatches
from tfm.data.store import prepare, store_directory
from tfm.training.step import trainer_of


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare steps on real data with steps over one repeated batch."""

    workdir: Path
    """Directory for the token store."""
    config: str = "multi30k"
    """Name of a shipped config, or the path of a .py file with get_config()."""
    blocks: int = 10
    """Blocks of each kind."""
    steps: int = 10
    """Steps in a block."""


def main() -> None:
    arguments, config = parse("benchmarks/input_pipeline.py", sys.argv[1:], Arguments)
    store = prepare(config, store_directory(config, arguments.workdir))
    mesh = sharding.make_mesh(config.mesh)
    trainer = trainer_of(config, store.tokenizer.vocab_size, mesh)
    batches = TrainBatches(store, config.data.train_split, config)
    rows = sharding.batch_sharding(mesh)
    seconds: dict[str, list[float]] = {"repeated": [], "real": []}
    with jax.set_mesh(mesh):
        state = trainer.init()
        one = batches.global_batch(0, rows)
        state, metrics = trainer.train_step(state, one)
        # Readers work beside the real blocks alone. Their first steps, of batches that were built before, aren't timed,
        # and they have as many left to build at the end.
        ahead = config.data.read_ahead
        for block in range(arguments.blocks):
            for kind, times in seconds.items():
                first = block * arguments.steps
                read = batches.read_ahead(first, first + arguments.steps + 2 * ahead, rows)
                stream = itertools.repeat((0, one)) if kind == "repeated" else read
                with contextlib.closing(read):  # which begins when it is first asked
                    for number in range(ahead + arguments.steps):
                        start = time.perf_counter()
                        state, metrics = trainer.train_step(state, next(stream)[1])
                        jax.block_until_ready(metrics)
                        if number >= ahead:
                            times.append(time.perf_counter() - start)
    start, count = time.process_time(), 50
    for k in range(count):
        batches.host_batch(k)
    built = (time.process_time() - start) / count
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(f"median step, one repeated batch  {medians['repeated'] * 1e3:8.1f} ms")
    print(f"median step, real data           {medians['real'] * 1e3:8.1f} ms")
    print(f"ratio                            {medians['real'] / medians['repeated']:8.3f}")
    print(f"CPU time to build a batch        {built * 1e3:8.2f} ms")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"benchmarks/input_pipeline.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
