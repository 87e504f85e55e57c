"""What one GPU makes of tfm: training steps, searches, a whole run, its prediction, and a run that was killed.

    pip install -r benchmarks/requirements.txt
    python benchmarks/gpu.py --corpus='text:DIR/{split}.{lang}.gz' --out=results      # DIR holds Multi30k
    python benchmarks/gpu.py --small --out=results                                    # tried on a CPU, at small size

Stages, each with a JSON file under `--out` that names the card and the versions; `--only` chooses some of them, and
each has `--limit` seconds:

- train: `tfm benchmark train`, the big model with a vocabulary of 32,000, dropout 0.1, 256 rows of 128 tokens.
- predict: what the predictor of `tfm plan` makes of the same step, given the matrix-product peak of the stage before
  and the bandwidth of a copy, against the time that was measured; products and memory traffic one after the other.
- step: the same step beside PyTorch's `nn.Transformer`, in turn (`benchmarks/train_step.py --sizes=big`).
- decode: the base model's beam search beside Hugging Face Marian, in turn (`benchmarks/decoding.py`).
- resume: a run with `training.deterministic`, killed after its first checkpoint and started again, against one that
  never was: equal to the bit?
- run: `configs/multi30k.py` from the start of the process to its end, then greedy BLEU on the test set.

Run directories go to `--work`, a temporary directory when unset.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(ROOT))  # what is measured is this checkout, installed or not

from results import surroundings  # noqa: E402

from tfm.training.metrics import read_events  # noqa: E402

STAGES = ("train", "predict", "step", "decode", "resume", "run")
BIG = (
    *("--config=big", "--data.vocab_size=32000", "--model.dropout_rate=0.1"),
    *("--data.source_row_length=128", "--data.target_row_length=128", "--training.target_tokens_per_batch=32768"),
)
SMALL = (
    "--config=demo",
    "--data.vocab_size=1000",
    "--model.dropout_rate=0.1",
    "--training.target_tokens_per_batch=512",
)
_RESUMED = (
    *("--training.deterministic=True", "--training.evaluate_sentences=1", "--training.log_every=1"),
    "--optimizer.warmup_steps=10",
)


class Stage:
    """One of STAGES: what it may use, and until when."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.file = arguments.out / f"{name}.json"
        self.out, self.work, self.small, self.corpus = arguments.out, arguments.work, arguments.small, arguments.corpus
        self.deadline = time.monotonic() + arguments.limit

    def seconds_left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def python(self, *arguments: object) -> None:
        """Runs a command to its end. Raises where it fails, or takes longer than the stage may."""
        subprocess.run([sys.executable, *map(str, arguments)], check=True, timeout=self.seconds_left())

    def watched(self, *arguments: object, until: Callable[[], bool]) -> subprocess.Popen:
        """Runs a command until it has ended or `until` says so; a command that takes too long is killed."""
        process = subprocess.Popen([sys.executable, *map(str, arguments)])
        try:
            while process.poll() is None and not until():
                if time.monotonic() > self.deadline:
                    raise TimeoutError(f"{arguments[0]} was not done within --limit")
                time.sleep(0.005)
        except BaseException:
            process.kill()
            raise
        return process

    def described(self, result: dict) -> None:
        """Writes the result, and what it was measured on as a process that may use the device sees it."""
        self.file.write_text(json.dumps(result, indent=2) + "\n")
        self.python(__file__, "--describe", self.file, shlex.join(["python", *sys.argv]))

    def fresh(self, name: str) -> Path:
        """A run directory in which no earlier run is."""
        workdir = self.work / name
        shutil.rmtree(workdir, ignore_errors=True)
        return workdir

    def corpus_options(self) -> tuple[str, ...]:
        return ("--config=demo",) if self.small else ("--config=multi30k", f"--data.corpus={self.corpus}")


def train(stage: Stage) -> None:
    options = SMALL if stage.small else BIG
    stage.python("-m", "tfm", "benchmark", "train", *options, "--lengths=full", "--steps=15", f"--json={stage.file}")


def predict(stage: Stage) -> None:
    measured = stage.out / "train.json"
    if not measured.exists():
        raise SystemExit(f"{measured} is not there: what is predicted is the step of the stage `train`, run that too")
    # By itself in a process: two that hold the memory of one device are in each other's way.
    more = ["--small"] * stage.small
    stage.python(__file__, "--predict-from", measured, *more, stage.file)


def predicted(measured: Path, small: bool, file: Path) -> None:
    import dataclasses

    import jax

    from tfm import sharding
    from tfm.chips import Chip
    from tfm.commands.options import parse
    from tfm.commands.train import Arguments
    from tfm.planning.compiled import compile_train_step
    from tfm.planning.prediction import predict
    from tfm.training.step import trainer_of

    report = json.loads(measured.read_text())
    options = SMALL if small else BIG
    if not set(options) <= set(report["command"].split()):
        raise SystemExit(f"{measured}: of another step; run the stage train as well")
    kind = jax.devices()[0].device_kind
    if report["device"]["device_kind"] != kind:
        raise SystemExit(f"{measured}: of {report['device']['device_kind']}, and this is {kind}: run train as well")
    _, config = parse("train", ["--workdir=unused", *options], Arguments)
    trainer = trainer_of(config, config.data.vocab_size, sharding.make_mesh(config.mesh))
    compiled = compile_train_step(trainer)
    bandwidth = copy_bandwidth()
    chip = Chip(kind, report["matmul_peak_flops"], 0, bandwidth, 0)
    # The formula's FLOPs: most products are calls of cuBLAS, whose text says nothing of them.
    made = predict(chip, report["model_flops"], compiled.counts.main_memory_bytes, 0)
    seconds = report["step_seconds_median"]
    result = {
        **dataclasses.asdict(chip),
        "counts": {**dataclasses.asdict(compiled.counts), "collectives": len(compiled.counts.collectives)},
        **dataclasses.asdict(made),
        "predicted_step_seconds": made.largest_seconds,
        "predicted_step_seconds_as_sum": made.sum_seconds,
        "measured_step_seconds": seconds,
        "largest_over_measured": made.largest_seconds / seconds,
        "sum_over_measured": made.sum_seconds / seconds,
        **surroundings(),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"predicted {made.sum_seconds * 1e3:.2f} ms a step, measured {seconds * 1e3:.2f} ms")


def copy_bandwidth(size: int = 2**28, times: int = 20) -> float:
    """Bytes/s, those read and those written, of an array that is read and written again."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    again = jax.jit(lambda x: -x, donate_argnums=0)
    x = jax.block_until_ready(again(x))
    start = time.perf_counter()
    for _ in range(times):
        x = again(x)
    jax.block_until_ready(x)
    return 2.0 * x.nbytes * times / (time.perf_counter() - start)


def step(stage: Stage) -> None:
    sizes = ("--shapes", "4x16") if stage.small else ("--sizes=big", "--shapes", "256x128")
    stage.python(BENCHMARKS / "train_step.py", *sizes, "--rounds=7", f"--json={stage.file}")


def decode(stage: Stage) -> None:
    more = (
        ("--lines=8", "--rows", "8")
        if stage.small
        else ("--config=base", "--device=gpu", "--beams", "4", "--rows", "250", "500", "1000")
    )
    stage.python(BENCHMARKS / "decoding.py", *more, "--without", "ctranslate2", "--rounds=3", f"--json={stage.file}")


def resume(stage: Stage) -> None:
    runs, resumed_after = {}, 0
    steps = 60 if stage.small else 400  # a fast card goes on for a hundred while a checkpoint is written
    options = (f"--training.steps={steps}", f"--training.evaluate_every={steps}", *_RESUMED)
    options += (f"--training.checkpoint_every={steps // 4}",)
    for name in ("uninterrupted", "killed"):
        workdir = runs[name] = stage.fresh(name)
        command = (ROOT / "train.py", f"--workdir={workdir}", *stage.corpus_options(), *options)
        if name == "killed":
            # A while after its checkpoint is whole: what was logged since is trained again.
            process = stage.watched(*command, until=lambda its=workdir: 0 < finished(its) <= last_step(its) - 10)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise SystemExit(f"train.py ended with status {process.returncode} before it was to be killed")
            resumed_after = finished(workdir)
        stage.python(*command)
    logs = [
        [{k: v for k, v in e.items() if not k.endswith("_per_second")} for e in events(workdir)]
        for workdir in runs.values()
    ]
    stage.python(__file__, "--compare", *runs.values(), stage.file)
    result = {"resumed_after_step": resumed_after, **json.loads(stage.file.read_text())}
    result |= {"log_is_equal": logs[0] == logs[1], "lines_logged": len(logs[1])}
    stage.described(result)
    print(result)


def run(stage: Stage) -> None:
    workdir = stage.fresh("multi30k")
    options = (f"--workdir={workdir}", *stage.corpus_options())
    if stage.small:
        options += ("--training.steps=30", "--training.evaluate_every=15", "--optimizer.warmup_steps=10")
    start, reached = time.time(), []

    def noted() -> bool:
        if not reached and max(validation_scores(workdir), default=0.0) >= 39.0:
            reached.append(time.time() - start)
        time.sleep(0.5)
        return False

    process = stage.watched(ROOT / "train.py", *options, until=noted)
    seconds = time.time() - start
    if process.returncode:
        raise SystemExit(f"train.py ended with status {process.returncode}")
    scored = stage.work / "multi30k-test.json"
    stage.python("-m", "tfm", "evaluate", f"--workdir={workdir}", "--decoding.beam_size=1", f"--json={scored}")
    stage.described(
        {
            "seconds_of_the_run": seconds,
            "seconds_to_39_validation_bleu": reached[0] if reached else None,
            "seconds_to_the_test_score": time.time() - start,
            "best_validation_bleu": max(validation_scores(workdir)),
            "test": json.loads(scored.read_text()),
        }
    )


def events(workdir: Path) -> list[dict]:
    """The log so far."""
    path = workdir / "metrics.jsonl"
    return list(read_events(path)) if path.exists() else []


def validation_scores(workdir: Path) -> list[float]:
    return [event["bleu"] for event in events(workdir) if event["kind"] == "validation"]


def last_step(workdir: Path) -> int:
    return max((event["step"] for event in events(workdir)), default=0)


def finished(workdir: Path) -> int:
    """The newest step with a manifest, the last that is written of a checkpoint; 0 before there is any."""
    return max((int(path.parent.name) for path in workdir.glob("checkpoints/[0-9]*/manifest.json")), default=0)


def compared(first: str, second: str, file: Path) -> None:
    """Are the newest checkpoints' parameters equal to the bit?"""
    import jax
    import numpy as np

    from tfm.checkpoint import CheckpointReader, RunDirectory
    from tfm.data.tokenizer import Tokenizer
    from tfm.sharding import make_mesh
    from tfm.training.step import trainer_of

    states = []
    for path in (first, second):
        run = RunDirectory.open(path)
        mesh = make_mesh(run.config.mesh)
        size = Tokenizer.load(run.tokenizer_path).vocab_size
        trainer = trainer_of(run.config, size, mesh)
        restored = CheckpointReader(run).restore(trainer.abstract_state._asdict())
        states.append(jax.tree.leaves(restored.state))
    equal = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*states, strict=True)]
    file.write_text(json.dumps({"arrays_equal_to_the_bit": sum(equal), "arrays": len(equal)}) + "\n")


def described(file: Path, command: str) -> None:
    result = json.loads(file.read_text()) | surroundings() | {"command": command}
    file.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="directory for the results")
    parser.add_argument("--work", type=Path, help="directory for runs; a temporary one, removed at the end, if unset")
    parser.add_argument("--corpus", default="text:multi30k/{split}.{lang}.gz", help="Multi30k, as data.corpus has it")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a stage may take")
    parser.add_argument("--small", action="store_true", help="the embedded corpus and a small model, on any device")
    parser.add_argument("--predict-from", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--describe", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("file", nargs="?", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.predict_from:
        predicted(arguments.predict_from, arguments.small, arguments.file)
    elif arguments.compare:
        compared(*arguments.compare, arguments.file)
    elif arguments.describe:
        described(Path(arguments.describe[0]), arguments.describe[1])
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out={arguments.out}: cannot be written: {error.strerror}") from error
    failed = []
    with tempfile.TemporaryDirectory() as place:
        arguments.work = arguments.work or Path(place)
        for name in (name for name in STAGES if name in arguments.only):
            start, stage = time.time(), Stage(name, arguments)
            stage.file.unlink(missing_ok=True)  # of an earlier start: what another stage reads is of this one
            try:
                globals()[name](stage)
            except (Exception, SystemExit) as error:  # the other stages can be had all the same
                print(f"{name}: {error}", file=sys.stderr)
                failed.append(name)
            print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
