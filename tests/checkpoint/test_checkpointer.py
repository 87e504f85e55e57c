"""Saving and resuming: what is kept, and what kills, damage and full disks leave."""

import errno
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.states import abstract, assert_same, flip_bit, small_state
from tests.disk import to_disk
from tfm import hosts
from tfm.checkpoint import Checkpointer, CheckpointReader, RunDirectory
from tfm.checkpoint import checkpointer as module
from tfm.checkpoint import manifest as manifests
from tfm.config import InputError


def test_arrays_may_be_donated_as_soon_as_save_returns(run):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"parameters": {"w": jnp.zeros(500_000)}}
    with Checkpointer(run, keep_last=9) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state)
            state = add(add(state))
    for step in range(3):
        assert np.all(CheckpointReader(run).restore(abstract(state), step).state["parameters"]["w"] == 2 * step)


def test_a_step_damaged_twice_keeps_both(copy):
    for _ in range(2):
        flip_bit(copy.checkpoints_path / "3")
        with Checkpointer(copy) as checkpointer:
            checkpointer.resume(abstract(small_state(0)))
            checkpointer.save(3, small_state(3))
    assert {path.name for path in (copy.checkpoints_path / "damaged").iterdir()} == {"3", "3-2"}


def test_a_copy_without_manifests_is_no_run_to_start_anew(copy):
    for step in (1, 2, 3):
        (copy.checkpoints_path / str(step) / "manifest.json").unlink()
    with (
        pytest.raises(
            InputError, match=r"no usable checkpoint: step 1: has no manifest; step 2: .*put back a good copy"
        ),
        Checkpointer(copy) as checkpointer,
    ):
        checkpointer.resume(abstract(small_state(0)))
    assert {path.name for path in copy.checkpoints_path.iterdir()} == {"1", "2", "3"}


def test_of_checkpoints_that_hosts_see_differently_those_of_the_first_count(run, monkeypatch):
    """A network disk may still show to others what the first has moved aside, and they would not save it again."""
    with Checkpointer(run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small_state(step))
    monkeypatch.setattr(hosts, "agreed", lambda found: [its for its in found if its["step"] == 1])
    with Checkpointer(run) as checkpointer:
        assert [*checkpointer._finished] == [1]
        assert checkpointer._finished[1] == CheckpointReader(run)._known()[1]


@pytest.mark.parametrize(("number", "advice"), [(errno.EACCES, "make the directory writable and "), (errno.EIO, "")])
def test_what_helps_is_said_of_an_error_that_it_helps(run, number, advice):
    error = Checkpointer(run)._explained(3, OSError(number, "no"))
    assert str(error).endswith(f"there is no good checkpoint yet: {advice}run the same command again")


def test_an_unfinished_step_is_passed_over_and_said(copy, caplog):
    (copy.checkpoints_path / "3" / "manifest.json").unlink()
    (copy.checkpoints_path / "4.orbax-checkpoint-tmp" / "parameters").mkdir(parents=True)
    (copy.checkpoints_path / "removing-0").mkdir()
    assert CheckpointReader(copy).steps() == [1, 2]
    assert f"{copy.checkpoints_path / '3'}: unfinished (no manifest.json), passed over" in caplog.text
    with Checkpointer(copy) as checkpointer:
        assert checkpointer.resume(abstract(small_state(0))).step == 2
        assert {path.name for path in copy.checkpoints_path.iterdir()} == {"1", "2", "damaged"}
        checkpointer.save(3, small_state(3))
    assert CheckpointReader(copy).steps() == [1, 2, 3]


@pytest.mark.parametrize(("best", "kept"), [("higher", [1, 6, 7]), ("lower", [4, 6, 7])])
def test_the_newest_and_the_best_are_kept(run, best, kept):
    with Checkpointer(run, keep_last=2, keep_best=1, best=best) as checkpointer:
        for step, metric in enumerate([5.0, float("nan"), None, 1.0, 2.0, None, 3.0], start=1):
            checkpointer.save(step, small_state(step))
            if metric is not None:
                checkpointer.note(step, metric)
            checkpointer.wait()
            assert step in checkpointer.steps()
    assert CheckpointReader(run).steps() == kept
    assert [path.name for path in run.checkpoints_path.iterdir() if not path.name.isdigit()] == []
    with Checkpointer(run, keep_last=1, keep_best=0) as again:  # knows what an earlier process saved
        again.save(8, small_state(8))
    assert CheckpointReader(run).steps() == [8]


def test_nothing_is_removed_before_the_newer_step_is_finished(run, monkeypatch):
    from tfm.checkpoint import manifest as manifests

    with Checkpointer(run, keep_last=1, keep_best=0) as checkpointer:
        checkpointer.save(1, small_state(1))
        checkpointer.wait()
        write, there = manifests.write, []

        def note(directory, manifest):
            there.append((run.checkpoints_path / "1" / "manifest.json").exists())
            write(directory, manifest)

        monkeypatch.setattr(manifests, "write", note)
        checkpointer.save(2, small_state(2))
    assert there == [True] and CheckpointReader(run).steps() == [2]


def test_a_full_disk_is_said_the_last_good_step_named_and_saving_goes_on(run):
    """The limit on a file's size stands in for a full disk: the kernel refuses the write in the same place."""
    big = {"parameters": {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(run)
    checkpointer.save(1, big)
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        checkpointer.save(2, big)
        with pytest.raises(
            InputError, match=r"no space left .* while saving step 2; the last good checkpoint is step 1"
        ):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["1"]
    checkpointer.save(2, big)
    checkpointer.wait()
    assert CheckpointReader(run).steps() == [1, 2]


def test_a_full_disk_at_the_manifest_leaves_no_step(run, monkeypatch):
    from tfm.checkpoint import manifest as manifests

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    checkpointer = Checkpointer(run)
    with monkeypatch.context() as patched:
        patched.setattr(manifests, "write_atomically", full)
        checkpointer.save(1, small_state(1))
        with pytest.raises(InputError, match=r"no space left .* saving step 1; there is no good checkpoint yet"):
            checkpointer.save(2, small_state(2))
    assert list(run.checkpoints_path.iterdir()) == []
    with checkpointer:
        checkpointer.save(2, small_state(2))
    assert checkpointer.steps() == [2]


def test_checkpoints_that_is_no_directory(run):
    checkpointer = Checkpointer(run)
    run.checkpoints_path.write_text("a file")
    with pytest.raises(InputError, match=r"step 1 cannot be saved .*; there is no good checkpoint yet"):
        checkpointer.save(1, small_state(1))
    with pytest.raises(InputError, match="checkpoints: cannot be read"):
        CheckpointReader(run).restore(abstract(small_state(0)))


def test_reading_waits_for_the_save_under_way(run):
    checkpointer = Checkpointer(run)
    for step, read in enumerate([checkpointer.restore, checkpointer.resume] * 3):
        checkpointer.save(step, small_state(step))
        assert_same(read(abstract(small_state(0))).state, small_state(step))


def test_a_step_is_saved_once(run):
    with Checkpointer(run) as checkpointer:
        checkpointer.save(1, small_state(1))
        checkpointer.save(1, small_state(2))
    assert_same(CheckpointReader(run).restore(abstract(small_state(0))).state, small_state(1))


def test_what_an_evaluation_gave_joins_the_checkpoint(copy):
    """Also of a later process; and what is kept, is kept by it."""
    with Checkpointer(copy, keep_last=1) as checkpointer:
        checkpointer.note(3, float("inf"), {"scores": {"loss": None}})
    assert CheckpointReader(copy).steps() == [1, 3]
    restored = CheckpointReader(copy).restore(abstract(small_state(0)), 3)
    assert (restored.metric, restored.metadata) == (None, {"corpus": "abc", "scores": {"loss": None}})


def test_an_error_under_way_is_seen_by_polling(run, monkeypatch):
    from tfm.checkpoint import manifest as manifests

    def broken(*_, **__):
        raise ValueError("a bug\nin two lines")

    monkeypatch.setattr(manifests, "hash_files", broken)
    checkpointer = Checkpointer(run)
    checkpointer.save(1, small_state(1))
    with pytest.raises(RuntimeError, match=r"saving step 1 failed \(ValueError: a bug\); there is no good"):
        for _ in range(1000):
            checkpointer.poll()
            time.sleep(0.01)
    checkpointer.poll()  # it is said once


CHILD = """
import sys
import jax.numpy as jnp, jax
from tfm.checkpoint import Checkpointer, RunDirectory
from tfm.config import Config

def state(step):
    return {"parameters": {f"w{i}": jnp.full((50_000,), step, jnp.float32) for i in range(4)}, "step": jnp.int32(step)}

checkpointer = Checkpointer(RunDirectory.create(sys.argv[1], Config()), keep_last=2)
restored = checkpointer.resume(state(0))
step = 0 if restored is None else restored.step
for step in range(step + 1, step + 400):
    checkpointer.save(step, state(step))
    checkpointer.note(step, float(step % 7))
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_loses_no_finished_step(tmp_path):
    last, generator = 0, random.Random(0)
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "run"], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(generator.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        finished = [int(line) for line in child.communicate()[0].split()]
        last = max([last + 1, *finished])
        run = RunDirectory.open(tmp_path / "run")
        shape = {"parameters": {f"w{i}": jnp.zeros(50_000) for i in range(4)}, "step": jnp.int32(0)}
        restored = CheckpointReader(run).restore(shape)
        assert restored.step in (last, last + 1)
        assert int(restored.state["step"]) == restored.step
        assert all(np.all(w == restored.step) for w in restored.state["parameters"].values())
        assert not [path for path in (run.checkpoints_path / "damaged").glob("*/manifest.json")]
        last = restored.step


def test_as_many_of_the_best_are_kept_as_are_asked_for(run):
    with Checkpointer(run, keep_last=1, keep_best=2) as checkpointer:
        for step, metric in enumerate([5.0, 7.0, 6.0, 1.0], start=1):
            checkpointer.save(step, small_state(step))
            checkpointer.note(step, metric)
    assert CheckpointReader(run).steps() == [2, 3, 4]


def test_what_is_removed_first_loses_its_name(run, monkeypatch):
    """A kill half-way would leave a damaged step otherwise."""
    removed = []
    monkeypatch.setattr(module, "remove_tree", lambda path: removed.append(path.name))
    with Checkpointer(run, keep_last=1, keep_best=0) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small_state(step))
    assert removed == ["removing-1"] and not (run.checkpoints_path / "1").exists()


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest(run, monkeypatch):
    done = to_disk(monkeypatch)
    with Checkpointer(run) as checkpointer:
        checkpointer.save(1, small_state(1))
    directory = run.checkpoints_path / "1"
    at = done.index(f"replace {directory / 'manifest.json'}")
    assert {str(directory / name) for name in manifests.read(directory).files} <= set(done[:at])
    assert str(run.checkpoints_path) in done[at:]


def test_a_first_save_that_was_cut_off_is_no_hindrance(run):
    with Checkpointer(run) as checkpointer:
        checkpointer.save(1, small_state(1))
    (run.checkpoints_path / "1" / "manifest.json").unlink()
    with Checkpointer(run) as checkpointer:
        assert checkpointer.resume(abstract(small_state(0))) is None
        checkpointer.save(1, small_state(1))
    assert CheckpointReader(run).steps() == [1]


def test_a_host_whose_save_failed_does_not_keep_the_first_waiting(run, monkeypatch):
    class Failed:
        def result(self):
            raise OSError(errno.EIO, "no disk")

    directory = run.checkpoints_path / "1"
    directory.mkdir(parents=True)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "index", lambda: 1)
    monkeypatch.setattr(hosts, "agreed", lambda value: value)
    Checkpointer(run)._finish(Failed(), manifests.Manifest(1, {}, None, "higher", None, {}, {}))
    assert manifests.take_over(directory, 2) == [None]
