"""Do several processes train as one? On real data, over loopback, with what a pod does: start together, die, go on.

    python benchmarks/many_hosts.py --corpus='text:DIR/{split}.{lang}.gz' --tokens=4096 --json=many_hosts.json

A batch then has the 64 rows of the shipped config; without `--tokens`, that is with 512, it has 8, and all is quicker.

Every process runs `tfm train` on simulated devices of the CPU (2x4: two processes with four each). Each hashes the rows
that lie on its devices, all fields of them, and what the processes of a run hold is put together to the global batch.

1. 2x4 against 1x8: the hashes of the global batches, and the logged losses. The devices of one process are summed over
   in another order than those of several, so 1x8 runs twice: as anyone would start it, and with the sums that several
   processes have (Gloo's). The second shows what several processes change, the first what the order does to float32.
2. The checkpoint that 2x4 saved at `--resume_after`, gone on with by 1x8, 1x4, 4x1 and 1x1: the same, from there on.
3. One of two processes killed with SIGKILL, `--kills` times, at a random moment after a random step, and both started
   again: where they go on from, the losses in the end, and the arrays of the last checkpoint.
4. The seconds until the other process has ended by itself, its status and what it said.

Options that are not the script's go to `tfm train`: `--model.d_model=64` makes all of it quicker. Exits with 1 where
something does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results import add_json, write_results

ROOT = Path(__file__).parents[1]
DEVICES = 8
HEARTBEAT = 10  # seconds
LIMIT = 1800  # seconds in which a process has to have done what it is there for
PROCESS = ROOT / "benchmarks" / "many_hosts_process.py"
# Log lines of the process that is left: which of them say that it is because of another one?
CAUSES = re.compile(r"heartbeat|socket closed|connection (closed|reset)|unavailable|last word of host", re.IGNORECASE)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """A place for runs, and the options that all of them have."""

    def __init__(self, place: Path, arguments: argparse.Namespace, more: list[str]):
        self.place, self.steps = place, arguments.steps
        self.options = [
            *("--config=multi30k", f"--data.corpus={arguments.corpus}", f"--data.store={place / 'store'}"),
            *(f"--training.steps={arguments.steps}", f"--training.evaluate_every={arguments.steps}"),
            *(f"--training.target_tokens_per_batch={arguments.tokens}", "--training.evaluate_sentences=1"),
            *(f"--training.checkpoint_every={arguments.checkpoint_every}", f"--training.keep_last={arguments.steps}"),
            # The config's learning rates, but for their end, which so few steps have no room for; and a quick compile.
            *("--optimizer.schedule=inverse_sqrt", "--training.unroll_layers=1", "--training.log_every=1", *more),
        ]

    def run(self, name: str, layout: str, with_gloo: bool = False) -> Run:
        """The run of that name, its processes started and waited for; unless it is complete."""
        run = Run(self, name)
        if self.steps in run.saved() and run.losses("validation"):
            return run
        start = time.monotonic()
        program = run.start(layout, with_gloo)
        statuses = program.wait(LIMIT)
        if any(statuses):
            raise SystemExit(f"{name}: statuses {statuses}\n" + "\n".join(map(program.said, range(len(statuses)))))
        say(f"{name}: {layout}, {time.monotonic() - start:.0f} s")
        return run


class Run:
    """A run directory, and the hashes that its processes write beside it."""

    def __init__(self, bench: Bench, name: str):
        self.bench, self.name, self.starts = bench, name, 0
        self.workdir = bench.place / name

    def start(self, layout: str, with_gloo: bool = False) -> Program:
        self.starts += 1
        return Program(self, *map(int, layout.split("x")), with_gloo)

    def events(self) -> list[dict]:
        from tfm.training.metrics import read_events

        path = self.workdir / "metrics.jsonl"
        return list(read_events(path)) if path.exists() else []

    def losses(self, kind: str = "train") -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.events() if event["kind"] == kind}

    def last_step(self) -> int:
        return max(self.losses(), default=0)

    def saved(self) -> list[int]:
        """Steps of the finished checkpoints, which have a manifest."""
        return sorted(int(path.parent.name) for path in self.workdir.glob("checkpoints/[0-9]*/manifest.json"))

    def batches(self) -> dict[int, str]:
        """SHA-256 of each global batch whose rows were all read: of the rows' digests, in the order of the rows."""
        rows: dict[int, dict[int, str]] = {}
        for path in sorted(self.bench.place.glob(f"{self.name}-[0-9]*.hashes")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                read = json.loads(line)
                batch = rows.setdefault(read["batch"], {})
                for row, digest in read["rows"].items():
                    if batch.setdefault(int(row), digest) != digest:
                        raise SystemExit(f"{self.name}: row {row} of batch {read['batch']} was read with two contents")
        return {
            k: hashlib.sha256("".join(batch[row] for row in range(len(batch))).encode()).hexdigest()
            for k, batch in sorted(rows.items())
            if k < self.bench.steps
        }

    def arrays(self) -> dict[str, bytes]:
        """Every array of the newest checkpoint: parameters, average, optimizer state, counts."""
        import jax
        import numpy as np

        from tfm import sharding
        from tfm.checkpoint import CheckpointReader, RunDirectory
        from tfm.data.tokenizer import Tokenizer
        from tfm.training.step import trainer_of

        run = RunDirectory.open(self.workdir)
        mesh = sharding.make_mesh(run.config.mesh)
        trainer = trainer_of(run.config, Tokenizer.load(run.tokenizer_path).vocab_size, mesh)
        restored = CheckpointReader(run).restore(trainer.abstract_state._asdict())
        if restored is None or restored.step != self.bench.steps:
            raise SystemExit(f"{self.name}: no checkpoint of step {self.bench.steps}")
        leaves = jax.tree_util.tree_leaves_with_path(restored.state)
        return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


class Program:
    """The processes of one start of a run."""

    def __init__(self, run: Run, hosts: int, devices: int, with_gloo: bool):
        """`with_gloo`: one process starts as one of several would."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.run, self.processes, self.errors = run, [], []
        for host in range(hosts):
            options = [f"--hosts.coordinator={address}", f"--hosts.count={hosts}", f"--hosts.index={host}"]
            options += [f"--hosts.heartbeat_timeout={HEARTBEAT}"]
            self.errors.append(run.bench.place / f"{run.name}-{run.starts}-{host}.err")
            environment = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(run.bench.place / "compiled"),
                "BATCH_HASHES": str(run.bench.place / f"{run.name}-{host}.hashes"),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            }
            command = [sys.executable, str(PROCESS), f"--workdir={run.workdir}", *run.bench.options]
            with self.errors[host].open("wb") as errors:
                self.processes.append(
                    subprocess.Popen(
                        command + (options if hosts > 1 or with_gloo else []),
                        env=os.environ | environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )

    def said(self, host: int) -> str:
        return self.errors[host].read_text(errors="replace")

    def wait(self, limit: float) -> list[int]:
        """The statuses; what has not ended by then is killed."""
        deadline = time.monotonic() + limit
        try:
            for process in self.processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in self.processes:
                process.kill()
        return [process.wait() for process in self.processes]

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not reached():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                self.wait(0)
                raise SystemExit(f"{self.run.name}: ended too early\n{self.said(0)}\n{self.said(len(self.errors) - 1)}")
            time.sleep(0.05)


def furthest(mine: dict[int, float], other: dict[int, float]) -> float:
    """Largest relative difference; the steps have to be the same."""
    if mine.keys() != other.keys():
        return float("inf")
    return max(abs(mine[step] - other[step]) / abs(other[step]) for step in mine)


def compared(mine: Run, other: Run, after: int = 0) -> dict:
    """Batches and losses of two runs, after a step."""
    steps = range(after, mine.bench.steps)
    batches, others = mine.batches(), other.batches()
    found = {
        "steps": len(steps),
        "batches_with_the_same_hash": sum(k in batches and batches[k] == others.get(k) for k in steps),
        "loss_furthest_relative": furthest(
            *({step: loss for step, loss in run.losses().items() if step > after} for run in (mine, other))
        ),
        "validation_loss_furthest_relative": furthest(mine.losses("validation"), other.losses("validation")),
        "losses_equal_to_the_bit": mine.losses() == other.losses(),
    }
    say(f"{mine.name} and {other.name}: {found}")
    return found


def killed(bench: Bench, whole: Run, kills: int, seed: int, checkpoint_every: int) -> dict:
    """A run of 2x4, one of whose processes is killed again and again."""
    generator = random.Random(seed)
    run = Run(bench, "killed")
    shutil.rmtree(run.workdir, ignore_errors=True)
    for path in bench.place.glob("killed-*"):
        path.unlink()
    ends = []
    program, first = run.start("2x4"), 0
    for number in range(kills):
        # So that the last start, too, has something to do.
        last = min(first + generator.randint(1, 2 * checkpoint_every - 1), bench.steps - 2)
        program.wait_until(lambda least=last: run.last_step() >= least)
        time.sleep(generator.uniform(0, 1))
        victim = generator.randrange(2)
        if program.processes[1 - victim].poll() is not None:
            raise SystemExit(f"kill {number}: the other process had ended: {program.said(1 - victim)}")
        before = set(program.said(1 - victim).split("\n"))
        program.processes[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        try:
            status = program.processes[1 - victim].wait(20 * HEARTBEAT)
        except subprocess.TimeoutExpired:
            status = None
        seconds = time.monotonic() - start
        program.wait(0)
        saved, logged = run.saved(), run.last_step()
        program = run.start("2x4")
        program.wait_until(lambda program=program: "batches of" in program.said(0))
        resumed = [int(step) for step in re.findall(r"resumes after step (\d+)", program.said(0))]
        first = max(resumed, default=0)
        old = run.bench.place / f"{run.name}-{run.starts - 1}-{1 - victim}.err"
        said = [line for line in old.read_text(errors="replace").split("\n") if line not in before]
        ends.append(
            {
                "host_killed": victim,
                "logged_step": logged,
                "newest_checkpoint": max(saved, default=0),
                "resumed_after": first,
                "seconds_until_the_other_ended": round(seconds, 2),
                "status": status,
                "said": [line[:600] for line in said if CAUSES.search(line)][:3],
            }
        )
        say(f"kill {number + 1}: {ends[-1]}")
    statuses = program.wait(LIMIT)
    if any(statuses):
        raise SystemExit(f"after the last kill: statuses {statuses}: {program.said(0)}{program.said(1)}")
    mine, others = run.arrays(), whole.arrays()
    return {
        "seed": seed,
        "kills": ends,
        "longest_seconds_until_the_other_ended": max(end["seconds_until_the_other_ended"] for end in ends),
        "resumed_from_the_newest_checkpoint": sum(end["resumed_after"] == end["newest_checkpoint"] for end in ends),
        "ended_in_time_with_a_status_and_a_cause": sum(
            end["status"] not in (0, None) and bool(end["said"]) and end["seconds_until_the_other_ended"] <= HEARTBEAT
            for end in ends
        ),
        **compared(run, whole),
        "arrays": len(others),
        "arrays_equal_to_the_bit": sum(mine.get(name) == content for name, content in others.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="Multi30k, such as 'text:DIR/{split}.{lang}.gz'")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resume_after", type=int, default=30, help="a multiple of --checkpoint_every")
    parser.add_argument("--resume_on", nargs="*", default=["1x8", "1x4", "4x1", "1x1"], help="PROCESSESxDEVICES")
    parser.add_argument("--checkpoint_every", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512, help="training.target_tokens_per_batch")
    parser.add_argument("--seed", type=int, help="of the moments and of the processes that are killed; random if unset")
    parser.add_argument(
        "--workdir",
        type=Path,
        help="place for the runs, which stay; all but the killed one are taken up again; a temporary one if unset",
    )
    add_json(parser)
    arguments, more = parser.parse_known_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.workdir or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        report = measured(Bench(place, arguments, more), arguments)
    sys.exit(0 if all(report["holds"].values()) else 1)


def measured(bench: Bench, arguments: argparse.Namespace) -> dict:
    import jax

    report = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "heartbeat_timeout": HEARTBEAT,
    }
    one = bench.run("one", f"1x{DEVICES}")
    two = bench.run("two", f"2x{DEVICES // 2}")
    report["batches_sha256"] = hashlib.sha256("".join(one.batches().values()).encode()).hexdigest()
    report["two_as_one"] = compared(two, one)
    report["two_as_one_with_gloo"] = compared(two, bench.run("one-gloo", f"1x{DEVICES}", with_gloo=True))
    report["resumed"] = {}
    for layout in arguments.resume_on:
        name = f"resumed-{layout}"
        if not (bench.place / name).exists():
            shutil.copytree(two.workdir, bench.place / name)
            for step in two.saved():
                if step > arguments.resume_after:
                    shutil.rmtree(bench.place / name / "checkpoints" / str(step))
        report["resumed"][layout] = compared(bench.run(name, layout), two, arguments.resume_after)
    holds = {
        "two_as_one_within_1e-6": _same(report["two_as_one"], 1e-6),
        "two_as_one_with_gloo_equal_to_the_bit": _same(report["two_as_one_with_gloo"], 0),
        "resumed_within_1e-5": all(_same(found, 1e-5) for found in report["resumed"].values()),
    }
    report["holds"] = holds
    write_results(arguments.json, report)  # so far: the kills take long
    if arguments.kills:
        seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
        say(f"seed of the kills: {seed}")
        found = report["killed"] = killed(bench, two, arguments.kills, seed, arguments.checkpoint_every)
        holds |= {
            "killed_equal_to_the_bit": _same(found, 0)
            and found["losses_equal_to_the_bit"]
            and found["arrays"] == found["arrays_equal_to_the_bit"],
            "nothing_lost_beyond_the_last_checkpoint": found["resumed_from_the_newest_checkpoint"] == arguments.kills,
            "others_end_in_time": found["ended_in_time_with_a_status_and_a_cause"] == arguments.kills,
        }
        write_results(arguments.json, report)
    say(f"holds: {holds}")
    return report


def _same(found: dict, limit: float) -> bool:
    difference = max(found["loss_furthest_relative"], found["validation_loss_furthest_relative"])
    return found["batches_with_the_same_hash"] == found["steps"] and difference <= limit


if __name__ == "__main__":
    main()
