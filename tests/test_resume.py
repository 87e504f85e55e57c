"""Killed and resumed equals uninterrupted, to the bit; asked to stop, a run saves, ends, and goes on the same way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tfm import sharding
from tfm.checkpoint import CheckpointReader, RunDirectory
from tfm.data.tokenizer import Tokenizer
from tfm.model.transformer import Transformer
from tfm.training.step import Trainer

ROOT = Path(__file__).parents[1]
STEPS = 36
# Two devices that share parameters, dropout, accumulation, a moving average: whatever could go on in another way.
CHANGES = {
    **{
        "model.attention_dropout_rate": 0.1,
        "model.activation_dropout_rate": 0.1,
        "model.token_dropout_rate": 0.1,
        "optimizer.ema_decay": 0.9,
    },
    **{"mesh.data": 1, "mesh.fsdp": 2, "training.gradient_accumulation": 2, "data.window_pairs": 500},
    **{"training.steps": STEPS, "training.checkpoint_every": 4, "training.evaluate_every": STEPS // 2},
}


@pytest.fixture(scope="module")
def config_path(config_file) -> Path:
    return config_file(CHANGES)


class Process:
    """The training program, as a user starts it."""

    def __init__(self, config_path: Path, workdir: Path):
        self.workdir = workdir
        self._errors = workdir.with_suffix(".err")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "train.py", f"--config={config_path}", f"--workdir={workdir}"],
                env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")},
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def signal_at(self, step: int, number: signal.Signals) -> None:
        """Sends the signal once the log has that step."""
        while self._process.poll() is None:
            if any(event["step"] >= step for event in events(self.workdir)):
                self._process.send_signal(number)
                return
            time.sleep(0.002)
        raise AssertionError(f"ended before step {step}: {self.errors}")

    def status(self) -> int:
        output, _ = self._process.communicate(timeout=170)
        assert output == b""  # which is for results
        return self._process.returncode


def events(workdir: Path) -> list[dict]:
    """The whole lines of the log so far."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def numbers(workdir: Path, kind: str) -> list[dict]:
    """What was logged, without what depends on the clock."""
    return [
        {name: value for name, value in event.items() if not name.endswith("_per_second")}
        for event in events(workdir)
        if event["kind"] == kind
    ]


def final_state(workdir: Path) -> dict:
    """The newest checkpoint, whole."""
    run = RunDirectory.open(workdir)
    mesh = sharding.make_mesh(run.config.mesh, jax.devices()[:2])
    vocab_size = Tokenizer.load(run.tokenizer_path).vocab_size
    state = Trainer(run.config, Transformer(run.config.model, vocab_size), mesh).abstract_state
    restored = CheckpointReader(run).restore(state._asdict())
    assert restored.step == STEPS
    return restored.state


def assert_same(workdir: Path, expected: Path) -> None:
    for kind in ("train", "validation"):
        assert numbers(workdir, kind) == numbers(expected, kind)
    mine, theirs = final_state(workdir), final_state(expected)
    assert {"parameters", "optimizer", "ema", "step"} <= mine.keys()
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def uninterrupted(config_path, tmp_path_factory) -> Path:
    process = Process(config_path, tmp_path_factory.mktemp("uninterrupted") / "run")
    assert process.status() == 0, process.errors
    assert [event["step"] for event in numbers(process.workdir, "train")] == list(range(1, STEPS + 1))
    assert [event["step"] for event in numbers(process.workdir, "validation")] == [STEPS // 2, STEPS]
    return process.workdir


@pytest.fixture(scope="module")
def killed(config_path, uninterrupted, tmp_path_factory) -> Path:
    """A run that was killed at three random steps, and ended after all."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(uninterrupted / "store", workdir / "store")
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the steps to be killed at:", seed)
    generator = random.Random(seed)
    for first, last in ((1, 9), (12, 20), (23, 30)):
        process = Process(config_path, workdir)
        process.signal_at(generator.randint(first, last), signal.SIGKILL)
        assert process.status() == -signal.SIGKILL
    process = Process(config_path, workdir)
    assert process.status() == 0, process.errors
    assert "resumes after step" in process.errors
    return workdir


def test_killed_at_random_steps_ends_as_if_it_never_was(killed, uninterrupted):
    assert_same(killed, uninterrupted)


def test_a_flipped_bit_in_the_newest_checkpoint_costs_steps_and_nothing_else(
    killed, uninterrupted, config_path, tmp_path
):
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = workdir / "checkpoints" / str(STEPS)
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    process = Process(config_path, workdir)
    assert process.status() == 0, process.errors
    assert f"checkpoints/{STEPS}: damaged" in process.errors and largest.name in process.errors
    assert f"resumes after step {STEPS - 4}" in process.errors
    assert (workdir / "checkpoints" / "damaged" / str(STEPS) / largest.relative_to(newest)).read_bytes() == content
    assert_same(workdir, uninterrupted)


def test_sigterm_and_ctrl_c_save_and_the_same_command_goes_on(uninterrupted, config_path, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted / "store", workdir / "store")
    stopped = 0
    for number, step, status in ((signal.SIGTERM, 5, 143), (signal.SIGINT, 13, 130)):
        process = Process(config_path, workdir)
        process.signal_at(step, number)
        assert process.status() == status, process.errors
        assert "Traceback" not in process.errors and (not stopped or f"resumes after step {stopped}" in process.errors)
        stopped = events(workdir)[-1]["step"]
        assert stopped >= step and max(CheckpointReader(RunDirectory.open(workdir)).steps()) == stopped
        assert f"{number.name}: saved step {stopped}; the same command goes on from there" in process.errors
    expected = numbers(uninterrupted, "train")[:stopped]
    assert numbers(workdir, "train") == expected
