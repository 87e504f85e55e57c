"""Do all ways of timing a training step agree? Synthetic lengths, a corpus, its input pipeline, and a run's own log.

    python benchmarks/agreement.py --config=multi30k --workdir=DIR --data.corpus='text:DIR/{split}.{lang}.gz'

Blocks of each kind run in turn, in one process, so that a machine whose speed drifts is fair to all. The first three
step over batches that `tfm benchmark train` makes with `--lengths=natural`, `--lengths=corpus` and, beside it,
`--pipeline`; the last is `tfm train` itself in WORKDIR/run, which goes on for some more steps each time, by what its
log says. Prints the median seconds a step and, of rows that were all as full, microseconds a target token that is no
padding; and each beside the first, as the median of the ratios within a round.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from results import write_results

from tfm import backend, sharding
from tfm.benchmarking.train import DISTINCT_BATCHES, workload
from tfm.commands.lines import check_writable
from tfm.commands.options import parse
from tfm.config import Config, InputError
from tfm.training.loop import train
from tfm.training.step import trainer_of

_IN_AN_INTERVAL = 4  # steps between two lines of the run's log
_LEFT_OUT = 2  # intervals at the start of each part of the run: it resumes, and reads its first batches ahead


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare the benchmark's kinds of batches and a run's own log."""

    workdir: Path
    """Directory for the token store and the run."""
    config: str = "multi30k"
    """Name of a shipped config, or the path of a .py file with get_config()."""
    rounds: int = 6
    """Blocks of each kind."""
    steps: int = 12
    """Steps in a block."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    arguments, config = parse("benchmarks/agreement.py", sys.argv[1:], Arguments)
    if arguments.steps < 1 or arguments.steps % _IN_AN_INTERVAL:
        raise InputError(f"--steps={arguments.steps}: expected a multiple of {_IN_AN_INTERVAL}, as the log has lines")
    if arguments.json is not None:
        check_writable(arguments.json)
    backend.use_compilation_cache()
    data = dataclasses.replace(config.data, store=str(arguments.workdir / "store"))
    config = dataclasses.replace(config, data=data)
    mesh = sharding.make_mesh(config.mesh)
    rows = sharding.batch_sharding(mesh)
    blocks: dict[str, list[float]] = {name: [] for name in ("synthetic", "corpus", "pipeline", "log")}
    fill: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        synthetic = stack.enter_context(workload(config, "natural"))
        corpus = stack.enter_context(workload(config, "corpus"))
        held = {}
        for name, work in (("synthetic", synthetic), ("corpus", corpus)):
            held[name] = [work.batches.global_batch(k, rows) for k in range(DISTINCT_BATCHES)]
            fill[name] = float(np.mean([np.mean(np.asarray(batch.target_segments) > 0) for batch in held[name]]))
        fill["pipeline"] = fill["log"] = fill["corpus"]
        stack.enter_context(jax.set_mesh(mesh))
        trainer = trainer_of(config, corpus.vocab_size, mesh)
        state = trainer.init()
        for number in range(arguments.rounds):
            for name, batches in held.items():
                seconds, state = _timed(trainer, state, itertools.cycle(batches), arguments.steps)
                blocks[name].append(seconds)
            first, ahead = number * arguments.steps, config.data.read_ahead
            # As many are left to be read at the end as were read before the first, so that the reader works beside all.
            stream = corpus.batches.read_ahead(first, first + arguments.steps + 2 * ahead, rows)
            with contextlib.closing(stream):
                for _ in range(ahead):
                    state, _ = trainer.train_step(state, next(stream)[1])
                seconds, state = _timed(trainer, state, (batch for _, batch in stream), arguments.steps)
            blocks["pipeline"].append(seconds)
            blocks["log"].append(_logged(config, arguments.workdir / "run", number, arguments.steps))
            print(
                f"round {number + 1}: "
                + ", ".join(f"{name} {times[-1] * 1e3:.1f} ms" for name, times in blocks.items())
            )
    positions = config.rows_per_batch * config.data.target_row_length
    report = {
        name: {
            "step_seconds": statistics.median(times),
            "target_fill": fill[name],
            "microseconds_per_target_token_at_equal_fill": 1e6 * statistics.median(times) / positions / fill["corpus"],
            "ratio": statistics.median(a / b for a, b in zip(times, blocks["synthetic"], strict=True)),
            "blocks": times,
        }
        for name, times in blocks.items()
    }
    for name, its in report.items():
        print(
            f"{name:<10} {its['step_seconds'] * 1e3:8.1f} ms a step, rows {its['target_fill']:.1%} full, "
            f"{its['microseconds_per_target_token_at_equal_fill']:8.2f} µs a token, {its['ratio']:.3f}"
        )
    write_results(arguments.json, {"device": mesh.devices.flat[0].device_kind, **report})


def _timed(trainer, state, stream, steps: int):
    """Median seconds of steps that are waited for one by one, after one that is not timed; and the last state."""
    seconds = []
    for number in range(steps + 1):
        start = time.perf_counter()
        state, metrics = trainer.train_step(state, next(stream))
        jax.block_until_ready(metrics)
        if number:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), state


def _logged(config: Config, workdir: Path, part: int, steps: int) -> float:
    """Median seconds a step by the log of a run that goes on for `steps`, besides those that are left out."""
    last = (part + 1) * (steps + _LEFT_OUT * _IN_AN_INTERVAL)
    changed = dict(
        steps=last, log_every=_IN_AN_INTERVAL, checkpoint_every=last, evaluate_every=10**6, evaluate_sentences=1
    )
    with contextlib.redirect_stderr(None):
        train(dataclasses.replace(config, training=dataclasses.replace(config.training, **changed)), workdir)
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().split("\n")[:-1])
    rates = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
    return statistics.median(1 / rate for rate in rates[-(steps // _IN_AN_INTERVAL) :])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"benchmarks/agreement.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
