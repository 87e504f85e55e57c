"""Several processes as one program, over loopback: the same numbers as one, and what becomes of them when one fails."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tfm import sharding
from tfm.benchmarking.peak import MatmulPeak
from tfm.benchmarking.train import TrainTiming, time_training
from tfm.checkpoint import CheckpointReader, RunDirectory
from tfm.commands.config_files import load_config
from tfm.data.tokenizer import Tokenizer
from tfm.model.transformer import Transformer
from tfm.training.step import Trainer

ROOT = Path(__file__).parents[1]
STEPS = 12
LIMIT = 170  # seconds in which a process has to be done
CHANGES = {
    **{"mesh.data": -1, "mesh.fsdp": 2, "optimizer.ema_decay": 0.9, "training.evaluate_sentences": 40},
    **{"training.steps": STEPS, "training.checkpoint_every": 4, "training.evaluate_every": STEPS},
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Program:
    """One command on `hosts` processes with `devices` devices each."""

    def __init__(self, directory: Path, name: str, hosts: int, devices: int, *command: object, **of_host: object):
        address = f"localhost:{free_port()}"
        flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
        self.errors = [directory / f"{name}-{host}.err" for host in range(hosts)]
        self.outputs = [directory / f"{name}-{host}.out" for host in range(hosts)]
        self.processes = []
        for host in range(hosts):
            options = [f"--hosts.coordinator={address}", f"--hosts.count={hosts}", f"--hosts.index={host}"]
            options += ["--hosts.heartbeat_timeout=10", "--hosts.start_timeout=60"]
            extra = [of_host[f"host{host}"]] if f"host{host}" in of_host else []
            with self.errors[host].open("wb") as errors, self.outputs[host].open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command), *map(str, extra), *(options if hosts > 1 else [])],
                        env=os.environ | {"XLA_FLAGS": flags},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=errors,
                        cwd=ROOT,
                    )
                )

    def said(self, host: int = 0) -> str:
        return self.errors[host].read_text(errors="replace")

    def statuses(self, limit: float = LIMIT) -> list[int]:
        deadline = time.monotonic() + limit
        try:
            return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for_step(self, workdir: Path, step: int) -> None:
        while all(process.poll() is None for process in self.processes):
            if any(event["step"] >= step for event in events(workdir)):
                return
            time.sleep(0.01)
        raise AssertionError(f"ended before step {step}: {self.said()}")


def events(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def losses(workdir: Path, kind: str = "train") -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(workdir) if event["kind"] == kind}


def final_state(workdir: Path) -> dict[str, bytes]:
    """The newest checkpoint, leaf by leaf."""
    run = RunDirectory.open(workdir)
    mesh = sharding.make_mesh(run.config.mesh)
    model = Transformer(run.config.model, Tokenizer.load(run.tokenizer_path).vocab_size)
    restored = CheckpointReader(run).restore(Trainer(run.config, model, mesh).abstract_state._asdict())
    assert restored.step == STEPS
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.fixture(scope="module")
def config_path(config_file) -> Path:
    return config_file(CHANGES)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(config_path, place) -> Path:
    """The run on one process with eight devices."""
    workdir = place / "alone"
    program = Program(place, "alone", 1, 8, "train.py", f"--config={config_path}", f"--workdir={workdir}")
    assert program.statuses() == [0], program.said()
    return workdir


@pytest.fixture(scope="module")
def two(config_path, place, alone) -> Path:
    """The run on two processes with four devices each."""
    workdir = place / "two"
    program = Program(place, "two", 2, 4, "train.py", f"--config={config_path}", f"--workdir={workdir}")
    assert program.statuses() == [0, 0], program.said(0) + program.said(1)
    assert program.said(1).count("INFO") == 1  # that it is there; what happens is reported once
    assert "host 0 of 2, 4 of 8 devices" in program.said(0)
    return workdir


def test_two_processes_train_as_one(alone, two):
    mine, theirs = losses(two), losses(alone)
    assert list(mine) == list(theirs) == list(range(1, STEPS + 1))
    assert mine == pytest.approx(theirs, rel=1e-6)
    assert losses(two, "validation") == pytest.approx(losses(alone, "validation"), rel=1e-5)
    scores = [[event["bleu"] for event in events(run) if event["kind"] == "validation"] for run in (alone, two)]
    assert scores[0] == scores[1]
    plans = [
        json.loads((run / "checkpoints" / str(STEPS) / "manifest.json").read_text())["metadata"]["plan"]
        for run in (alone, two)
    ]
    assert plans[0] == plans[1]
    assert "coordinator" in (two / "config.json").read_text() and "localhost" not in (two / "config.json").read_text()


@pytest.mark.parametrize(("hosts", "devices", "mesh"), [(1, 8, "2"), (1, 4, "4"), (2, 2, "1"), (1, 1, "1")])
def test_another_layout_goes_on_with_the_same_batches(config_path, place, alone, two, hosts, devices, mesh):
    """From step 8 of the two processes: the losses of the run that was never interrupted."""
    workdir = place / f"resumed-{hosts}-{devices}"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    options = [f"--config={config_path}", f"--workdir={workdir}", f"--mesh.fsdp={mesh}"]
    program = Program(place, workdir.name, hosts, devices, "train.py", *options)
    assert program.statuses() == [0] * hosts, program.said()
    assert "resumes after step 8" in program.said()
    assert losses(workdir) == pytest.approx(losses(alone), rel=1e-5)


def test_a_killed_host_ends_the_others_and_nothing_is_lost(config_path, place, two):
    workdir = place / "killed"
    shutil.copytree(two / "store", workdir / "store")
    options = ["train.py", f"--config={config_path}", f"--workdir={workdir}"]
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the steps and hosts to be killed at:", seed)
    generator = random.Random(seed)
    for first, last in ((1, 4), (6, 9)):
        program = Program(place, f"killed-{first}", 2, 4, *options)
        program.wait_for_step(workdir, generator.randint(first, last))
        victim = generator.randrange(2)
        program.processes[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        statuses = program.statuses(limit=60)
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] not in (0, -signal.SIGKILL), program.said(1 - victim)
        assert time.monotonic() - start < 45  # 10 s, and a slow machine
        # The one that is left says why it ends, or JAX does.
        causes = [f"no last word of host {victim}", "leader task" if victim == 0 else "stopped sending heartbeats"]
        assert any(cause in program.said(1 - victim) for cause in causes), program.said(1 - victim)
    program = Program(place, "killed-last", 2, 4, *options)
    assert program.statuses() == [0, 0], program.said(0) + program.said(1)
    assert losses(workdir) == losses(two)
    assert final_state(workdir) == final_state(two)


def test_sigterm_on_one_host_saves_on_all(config_path, place, two):
    workdir = place / "told"
    shutil.copytree(two / "store", workdir / "store")
    options = ["train.py", f"--config={config_path}", f"--workdir={workdir}"]
    program = Program(place, "told", 2, 4, *options, "--training.steps=4000")
    program.wait_for_step(workdir, 2)
    program.processes[1].send_signal(signal.SIGTERM)
    assert program.statuses() == [143, 143], program.said(0) + program.said(1)
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == max(losses(workdir))


STUCK = """
import sys, time
from tfm.__main__ import main

if "--hosts.index=1" in sys.argv:
    from tfm.training import loop
    record = loop.Progress.record
    def stuck(self, step, metrics):
        record(self, step, metrics)
        if step == 3:
            time.sleep(1000)
    loop.Progress.record = stuck
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_stuck_host_is_ended_with_the_stacks_of_its_threads(config_path, place, two):
    workdir = place / "stuck"
    shutil.copytree(two / "store", workdir / "store")
    options = [f"--config={config_path}", f"--workdir={workdir}", "--hosts.step_timeout=10"]
    program = Program(place, "stuck", 2, 4, "-c", STUCK, *options)
    assert all(status not in (0, -signal.SIGKILL) for status in program.statuses(limit=120))
    assert "Timeout" in program.said(1) and "in stuck" in program.said(1)


def test_two_hosts_translate_as_one_does_and_score_and_evaluate(place, two, reversal):
    source = reversal / "test.en"
    found = []
    for hosts, devices in ((1, 4), (2, 2)):
        output = place / f"translated-{hosts}"
        options = [f"--workdir={two}", f"--input={source}", f"--output={output}", "--decoding.beam_size=2"]
        program = Program(place, f"translate-{hosts}", hosts, devices, "-m", "tfm", "translate", *options)
        assert program.statuses() == [0] * hosts, program.said()
        found.append(output.read_text())
    assert found[0] == found[1]
    assert found[0].count("\n") == 100
    rescored = place / "rescored"
    files = [f"--source={source}", f"--target={place / 'translated-2'}", f"--output={rescored}"]
    program = Program(place, "score", 2, 2, "-m", "tfm", "score", f"--workdir={two}", *files)
    assert program.statuses() == [0, 0], program.said()
    assert rescored.read_text().count("\n") == 100
    program = Program(place, "evaluate", 2, 2, "-m", "tfm", "evaluate", f"--workdir={two}", "--decoding.beam_size=2")
    assert program.statuses() == [0, 0], program.said()
    assert [b"bleu" in output.read_bytes() for output in program.outputs] == [True, False]
    program = Program(place, "translate-stdin", 2, 2, "-m", "tfm", "translate", f"--workdir={two}")
    assert program.statuses() == [2, 2]
    assert "--input=-: several hosts have one input" in program.said(0)


def test_two_hosts_are_timed_as_one(config_path, place):
    options = [f"--config={config_path}", "--steps=1", "--warmup=1"]
    reports = {}
    for kind, more in (("train", []), ("decode", ["--length=5", "--beams", "2", "--batches", "8"])):
        report = place / f"timed-{kind}.json"
        command = ["-m", "tfm", "benchmark", kind, *options, *more, f"--json={report}"]
        program = Program(place, f"timed-{kind}", 2, 1, *command)
        assert program.statuses() == [0, 0], program.said(0) + program.said(1)
        assert [b"target tokens/s" in output.read_bytes() for output in program.outputs] == [True, False]
        reports[kind] = json.loads(report.read_text())
        assert (reports[kind]["devices"], reports[kind]["device"]["processes"]) == (2, 2)
    devices = jax.devices()[:2]
    peak = MatmulPeak(devices, jax.numpy.dtype("float32"), sizes=(32,), seconds=0.001)
    alone = time_training(load_config(str(config_path)), devices, TrainTiming(steps=1, warmup=1), peak)
    assert reports["train"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    for key in ("model_flops", "target_padding", "collectives"):
        assert reports["train"][key] == alone[key]
    assert reports["decode"]["sentences"] == 8


def test_hosts_with_other_options_are_named(config_path, place):
    options = ["train.py", f"--config={config_path}", f"--workdir={place / 'differing'}"]
    program = Program(place, "differing", 2, 4, *options, host1="--model.d_ff=64")
    assert program.statuses() == [2, 2]
    for host in range(2):
        assert "model.d_ff is 32 on host 0 and 64 on host 1" in program.said(host)
    assert not (place / "differing").exists()


def test_hosts_that_do_not_share_the_run_directory_are_named_at_the_start(config_path, place):
    options = ["train.py", f"--config={config_path}", f"--workdir={place / 'shared'}"]
    program = Program(place, "unshared", 2, 4, *options, host1=f"--workdir={place / 'unshared'}")
    assert program.statuses() == [2, 2]
    assert "shared: another host does not see it" in program.said(0)
    assert f"--workdir={place / 'unshared'}: is {place / 'shared'} on host 0" in program.said(1)


def test_what_the_first_host_fails_at_ends_all(config_path, place, tmp_path):
    options = ["train.py", f"--config={config_path}", f"--workdir={tmp_path / 'run'}"]
    program = Program(place, "failing", 2, 4, *options, f"--data.corpus=text:{tmp_path}/none/{{split}}.{{lang}}")
    assert program.statuses() == [2, 2]
    assert "none" in program.said(0)
    assert "host 0 failed" in program.said(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hosts.coordinator=localhost"], "expected HOST:PORT"),
        (["--hosts.coordinator=localhost:PORT", "--hosts.count=2"], "give all three"),
        (["--hosts.coordinator=localhost:PORT", "--hosts.count=2", "--hosts.index=2"], "expected 0 to 1"),
        (["--hosts.coordinator=localhost:PORT", "--hosts.count=2", "--hosts.index=1"], "no answer within"),
        (["--hosts.coordinator=localhost:TAKEN", "--hosts.count=2", "--hosts.index=0"], "cannot be listened on"),
        (["--hosts.coordinator=localhost:PORT", "--hosts.count=2", "--hosts.index=0"], "not all hosts came within"),
        (["--hosts.coordinator=a..b:PORT", "--hosts.count=2", "--hosts.index=1"], "no host can have that name"),
    ],
)
def test_hosts_that_cannot_meet(config_path, tmp_path, options, message):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = {"PORT": str(free_port()), "TAKEN": str(taken.getsockname()[1])}
        options = [*options, "--hosts.start_timeout=5"]
        for name, port in ports.items():
            options = [option.replace(name, port) for option in options]
        process = subprocess.run(
            [sys.executable, "train.py", f"--config={config_path}", f"--workdir={tmp_path / 'run'}", *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    assert (process.returncode, process.stdout) == (2, "")
    assert message in process.stderr and "Traceback" not in process.stderr
