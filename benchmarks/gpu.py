"""What one GPU makes of tfm: training steps, searches, a whole run, its prediction, and a run that was killed.

    pip install -r benchmarks/requirements.txt
    python benchmarks/gpu.py --corpus='text:DIR/{split}.{lang}.gz' --out=results      # DIR holds Multi30k
    python benchmarks/gpu.py --small --out=results                                    # tried on a CPU, at small size

Stages, each with a JSON file under `--out`; `--only` chooses some of them:

- train: `tfm benchmark train`, the big model with a vocabulary of 32,000, dropout 0.1, 256 rows of 128 tokens.
- predict: what the predictor of `tfm plan` makes of the same step, given the matrix-product peak of the stage before
  and the bandwidth of a copy, against the time that was measured; products and memory traffic one after the other.
- step: the same step beside PyTorch's `nn.Transformer`, in turn (`benchmarks/train_step.py --sizes=big`).
- decode: the base model's beam search beside Hugging Face Marian, in turn (`benchmarks/decoding.py`).
- run: `configs/multi30k.py` from the start of the process to its end, then greedy BLEU on the test set.
- resume: a run with `training.deterministic`, killed and started again, against one that never was: equal to the bit?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tfm.training.metrics import read_events

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("train", "predict", "step", "decode", "run", "resume")
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
_RESUMED = ("--training.steps=60", "--training.checkpoint_every=20", "--training.evaluate_every=60")


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def train(arguments: argparse.Namespace, file: Path) -> None:
    options = SMALL if arguments.small else BIG
    python("-m", "tfm", "benchmark", "train", *options, "--lengths=full", "--steps=15", f"--json={file}")


def predict(arguments: argparse.Namespace, file: Path) -> None:
    # By itself in a process: two that hold the memory of one device are in each other's way.
    python(__file__, "--predict-from", str(arguments.out / "train.json"), *(["--small"] * arguments.small), str(file))


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
    _, config = parse("train", ["--workdir=unused", *options], Arguments)
    trainer = trainer_of(config, config.data.vocab_size, sharding.make_mesh(config.mesh))
    compiled = compile_train_step(trainer)
    bandwidth = copy_bandwidth()
    chip = Chip(jax.devices()[0].device_kind, report["matmul_peak_flops"], 0, bandwidth, 0)
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
        "predicted_over_measured": made.sum_seconds / seconds,
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


def step(arguments: argparse.Namespace, file: Path) -> None:
    sizes = ("--shapes", "4x16") if arguments.small else ("--sizes=big", "--shapes", "256x128")
    python("benchmarks/train_step.py", *sizes, "--rounds=7", f"--json={file}")


def decode(arguments: argparse.Namespace, file: Path) -> None:
    more = (
        ("--lines=8", "--rows", "8")
        if arguments.small
        else ("--config=base", "--device=gpu", "--beams", "4", "--rows", "128", "512")
    )
    python("benchmarks/decoding.py", *more, "--without", "ctranslate2", "--rounds=3", f"--json={file}")


def run(arguments: argparse.Namespace, file: Path) -> None:
    workdir = fresh(arguments.out / "multi30k")
    options = (f"--workdir={workdir}", *corpus_of(arguments))
    if arguments.small:
        options += ("--training.steps=30", "--training.evaluate_every=15", "--optimizer.warmup_steps=10")
    start = time.time()
    with subprocess.Popen([sys.executable, "train.py", *options], cwd=ROOT) as process:
        reached, best = None, 0.0
        while process.poll() is None:
            scores = [event["bleu"] for event in events(workdir) if event["kind"] == "validation"]
            best = max(scores, default=0.0)
            if best >= 39.0 and reached is None:
                reached = time.time() - start
            time.sleep(0.5)
    seconds = time.time() - start
    if process.returncode:
        raise SystemExit(f"train.py ended with status {process.returncode}")
    scored = arguments.out / "multi30k-test.json"
    python("-m", "tfm", "evaluate", f"--workdir={workdir}", "--decoding.beam_size=1", f"--json={scored}")
    result = {
        "seconds_of_the_run": seconds,
        "seconds_to_39_validation_bleu": reached,
        "seconds_to_the_test_score": time.time() - start,
        "best_validation_bleu": max(e["bleu"] for e in events(workdir) if e["kind"] == "validation"),
        "test": json.loads(scored.read_text()),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")


def fresh(workdir: Path) -> Path:
    """A directory in which no earlier run is."""
    shutil.rmtree(workdir, ignore_errors=True)
    return workdir


def corpus_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    return ("--config=demo",) if arguments.small else ("--config=multi30k", f"--data.corpus={arguments.corpus}")


def events(workdir: Path) -> list[dict]:
    """The log so far."""
    path = workdir / "metrics.jsonl"
    return list(read_events(path)) if path.exists() else []


def resume(arguments: argparse.Namespace, file: Path) -> None:
    runs = {}
    for name, kill_at in (("uninterrupted", None), ("killed", 30)):
        workdir = runs[name] = fresh(arguments.out / name)
        command = [sys.executable, "train.py", f"--workdir={workdir}", *corpus_of(arguments), *_RESUMED]
        command += ["--training.deterministic=True", "--training.log_every=1", "--optimizer.warmup_steps=10"]
        if kill_at is not None:
            with subprocess.Popen(command, cwd=ROOT) as process:
                while process.poll() is None and not any(e["step"] >= kill_at for e in events(workdir)):
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
            if process.returncode != -signal.SIGKILL:
                raise SystemExit(f"train.py ended with status {process.returncode} before it was to be killed")
        subprocess.run(command, cwd=ROOT, check=True)
    logs = [
        [{k: v for k, v in e.items() if not k.endswith("_per_second")} for e in events(workdir)]
        for workdir in runs.values()
    ]
    python(__file__, "--compare", *map(str, runs.values()), str(file))
    result = json.loads(file.read_text()) | {"log_is_equal": logs[0] == logs[1], "lines_logged": len(logs[1])}
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(result)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="directory for the results")
    parser.add_argument("--corpus", default="text:multi30k/{split}.{lang}.gz", help="Multi30k, as data.corpus has it")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--small", action="store_true", help="the embedded corpus and a small model, on any device")
    parser.add_argument("--predict-from", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("file", nargs="?", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.predict_from:
        predicted(arguments.predict_from, arguments.small, arguments.file)
        return
    if arguments.compare:
        compared(*arguments.compare, arguments.file)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in STAGES:
        if name in arguments.only:
            start = time.time()
            file = arguments.out / f"{name}.json"
            file.unlink(missing_ok=True)  # of an earlier start: what another stage reads is of this one
            try:
                globals()[name](arguments, file)
            except (Exception, SystemExit) as error:  # the other stages can be had all the same
                print(f"{name}: {error}", file=sys.stderr)
                failed.append(name)
            print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
