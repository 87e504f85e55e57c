"""Saving and restoring: to the bit, in any layout, through kills, damage and full disks."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tfm.checkpoint import Checkpointer, CheckpointReader, RunDirectory, storage
from tfm.config import Config, InputError


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def small_state(step: int) -> dict:
    return {
        "parameters": {"w": jnp.full((4, 6), step, jnp.float32), "b": jnp.arange(6.0) * step},
        "optimizer": {"mu": jnp.full((4, 6), -step, jnp.float32)},
        "step": jnp.int32(step),
    }


def assert_same(restored, state):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", Config())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3; copy it before changing anything."""
    run = RunDirectory.create(tmp_path_factory.mktemp("saved") / "run", Config())
    with Checkpointer(run) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, small_state(step), {"corpus": "abc"})
            checkpointer.note(step, float(-step))
    return run.path


@pytest.fixture
def copy(saved, tmp_path):
    return RunDirectory.open(shutil.copytree(saved, tmp_path / "copied"))


def optimizers():
    mask = {"dense": {"kernel": True, "bias": False}}
    return {
        "adam": optax.adam(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
        "masked": optax.chain(
            optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), mask), optax.scale_by_schedule(lambda n: n)
        ),
    }


@pytest.mark.parametrize("name", ["adam", "adafactor", "masked"])
def test_an_optimizer_state_comes_back_to_the_bit_in_its_own_structure(run, name):
    parameters = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 6)), "bias": jnp.ones(6)}}
    optimizer = optimizers()[name]
    _, inner = optimizer.update(parameters, optimizer.init(parameters), parameters)
    state = {"parameters": parameters, "ema": None, "optimizer": inner, "step": jnp.int32(5), "empty": {}}
    with Checkpointer(run) as checkpointer:
        checkpointer.save(5, state)
    assert_same(CheckpointReader(run).restore(abstract(state)).state, state)


def test_every_type_comes_back_to_the_bit(run):
    bits = np.array([0x7FC12345, 0x80000000, 0xFF800001, 1], np.uint32)  # NaNs with payloads, -0, a denormal
    state = {
        "parameters": {
            "float32": jnp.asarray(bits.view(np.float32)),
            "bfloat16": jnp.asarray((bits >> 16).astype(np.uint16).view(jnp.bfloat16)),
            "float16": jnp.array([-0.0, 1e-7, jnp.nan], jnp.float16),
            "float8": jnp.array([1.5, -0.0], jnp.float8_e4m3fn),
            "zeros": -jnp.zeros((3, 5)),
            **{f"{t}": jnp.array([[0, 1, 127]], t) for t in ("int8", "uint8", "int32", "uint32", "bool")},
        }
    }
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state)
    assert_same(CheckpointReader(run).restore(abstract(state)).state, state)


def test_a_sharded_state_comes_back_in_another_layout(run):
    wide = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    square = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    saved_as = NamedSharding(wide, PartitionSpec("fsdp"))
    state = {"parameters": {"w": jax.device_put(values, saved_as)}}
    with Checkpointer(run) as checkpointer:
        checkpointer.save(3, state)
    for sharding in (
        NamedSharding(square, PartitionSpec(None, "tensor")),
        NamedSharding(square, PartitionSpec()),
        SingleDeviceSharding(jax.devices()[5]),
    ):
        restored = CheckpointReader(run).restore(abstract(state, sharding)).state
        assert restored["parameters"]["w"].sharding == sharding
        assert_same(restored, state)


def test_arrays_may_be_donated_as_soon_as_save_returns(run):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"parameters": {"w": jnp.zeros(500_000)}}
    with Checkpointer(run, keep_last=9) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state)
            state = add(add(state))
    for step in range(3):
        assert np.all(CheckpointReader(run).restore(abstract(state), step).state["parameters"]["w"] == 2 * step)


def test_metadata_and_metric_come_back(copy):
    restored = CheckpointReader(copy).restore(abstract(small_state(0)))
    assert (restored.step, restored.metadata, restored.metric) == (3, {"corpus": "abc"}, -3.0)


def test_a_new_run_has_nothing_to_restore(run):
    assert CheckpointReader(run).restore(abstract(small_state(0))) is None
    assert Checkpointer(run).resume(abstract(small_state(0))) is None


def array_file(directory):
    """The file that holds the arrays of the parameters."""
    return max((directory / "parameters").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def flip_bit(directory):
    path = array_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path.name


def cut_short(directory):
    path = array_file(directory)
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def remove_file(directory):
    path = array_file(directory)
    path.unlink()
    return path.name


def add_file(directory):
    (directory / "parameters" / "more").write_text("")
    return "parameters/more"


def link_file(directory):
    path = array_file(directory)
    shutil.move(path, directory.parent.parent / "elsewhere")
    path.symlink_to(directory.parent.parent / "elsewhere")
    return f"{path.name} is a link"


def link_directory(directory):
    shutil.move(directory / "optimizer", directory.parent.parent / "elsewhere")
    (directory / "optimizer").symlink_to(directory.parent.parent / "elsewhere")
    return "optimizer is a link"


def link_step(directory):
    shutil.move(directory, directory.parent.parent / "elsewhere")
    directory.symlink_to(directory.parent.parent / "elsewhere")
    return "the directory is a link"


def link_manifest(directory):
    shutil.move(directory / "manifest.json", directory.parent.parent / "elsewhere")
    (directory / "manifest.json").symlink_to(directory.parent.parent / "elsewhere")
    return "manifest.json is a link"


def make_pipe(directory):
    os.mkfifo(directory / "parameters" / "pipe")
    return "parameters/pipe is neither a file nor a directory"


def flip_bit_in_manifest(directory):
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"metric": -3.0', b'"metric": -1.0'))
    return "manifest.json does not match its own checksum"


def escape(directory):
    """A manifest that is whole, and names a file of somebody else."""
    from tfm.checkpoint import manifest as manifests

    manifest = manifests.read(directory)
    manifest.files["../1/manifest.json"] = {"sha256": "0" * 64, "size": 1}
    manifests.write(directory, manifest)
    return "../1/manifest.json, which is outside the checkpoint"


DAMAGES = [
    *(flip_bit, cut_short, remove_file, add_file, link_file, link_directory, link_step, link_manifest, make_pipe),
    *(flip_bit_in_manifest, escape),
]


def listing(directory) -> dict:
    """Every name below `directory`, with the bytes or what a link points to."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_damage_is_noticed_and_named_the_step_before_used_and_nothing_lost(copy, damage, caplog):
    newest = copy.checkpoints_path / "3"
    named = damage(newest)
    before = listing(copy.path)
    aside = listing(newest)

    restored = CheckpointReader(copy).restore(abstract(small_state(0)))
    assert restored.step == 2
    assert_same(restored.state, small_state(2))
    assert f"{newest}: damaged, not used" in caplog.text and named in caplog.text
    parameters = CheckpointReader(copy).restore_parameters(abstract(small_state(0)["parameters"]), "last")
    assert parameters.step == 2
    assert listing(copy.path) == before  # a reader changes nothing

    with Checkpointer(copy) as checkpointer:
        assert checkpointer.resume(abstract(small_state(0))).step == 2
        assert not os.path.lexists(newest)
        assert listing(copy.checkpoints_path / "damaged" / "3") == aside
        checkpointer.save(3, small_state(3))
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 3
    assert listing(copy.checkpoints_path / "damaged" / "3") == aside


def test_a_step_damaged_twice_keeps_both(copy):
    for _ in range(2):
        flip_bit(copy.checkpoints_path / "3")
        with Checkpointer(copy) as checkpointer:
            checkpointer.resume(abstract(small_state(0)))
            checkpointer.save(3, small_state(3))
    assert {path.name for path in (copy.checkpoints_path / "damaged").iterdir()} == {"3", "3-2"}


def test_when_all_are_damaged_each_is_named_and_stays(copy):
    for step in "123":
        cut_short(copy.checkpoints_path / step)
    before = listing(copy.path)
    for restore in (CheckpointReader(copy).restore, Checkpointer(copy).resume):
        with pytest.raises(InputError, match=r"step 3: .* step 2: .* step 1: .*bytes in place of"):
            restore(abstract(small_state(0)))
    assert listing(copy.path) == before


def test_a_damaged_step_that_was_asked_for_is_not_replaced(copy):
    flip_bit(copy.checkpoints_path / "3")
    reader = CheckpointReader(copy)
    with pytest.raises(InputError, match=r"step 3: .*other content"):
        reader.restore(abstract(small_state(0)), step=3)
    with pytest.raises(InputError, match=r"step 3: .*other content"):
        reader.restore_parameters(abstract(small_state(0)["parameters"]), 3)
    with pytest.raises(InputError, match=r"no finished step 7; there are: 1, 2, 3"):
        reader.restore(abstract(small_state(0)), step=7)


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


def test_other_arrays_than_stored_are_refused(copy):
    reader = CheckpointReader(copy)
    state = abstract(small_state(0))
    narrow = state | {"optimizer": {"mu": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16, sharding=state["step"].sharding)}}
    with pytest.raises(InputError, match=r"optimizer/mu is float32\[4,6\] there and bfloat16\[4,6\] in this run"):
        reader.restore(narrow)
    with pytest.raises(InputError, match=r"optimizer/mu is .* there and nothing in this run"):
        reader.restore({"parameters": state["parameters"], "step": state["step"]})
    with pytest.raises(InputError, match="ema/mean is not stored there"):
        reader.restore(state | {"ema": {"mean": state["step"]}})
    with pytest.raises(ValueError, match="give the sharding"):
        reader.restore(jax.eval_shape(lambda: small_state(0)))


def test_another_tokenizer_than_the_parameters_belong_to_is_refused(run):
    run.tokenizer_path.write_bytes(b"model")
    with Checkpointer(run) as checkpointer:
        checkpointer.save(1, small_state(1))
    assert CheckpointReader(run).restore(abstract(small_state(0))).step == 1
    run.tokenizer_path.write_bytes(b"another")
    with pytest.raises(InputError, match="not the tokenizer that step 1 was trained with"):
        CheckpointReader(run).restore(abstract(small_state(0)))


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


def test_parameters_alone(run):
    """The average where the run keeps one, and without the optimizer's files."""
    for step, metric in ((1, 0.5), (2, 0.9), (3, 0.1), (4, None)):
        ema = {"ema": jax.tree.map(lambda x: x + 100, small_state(step)["parameters"])}
        with Checkpointer(run, keep_last=9) as checkpointer:
            checkpointer.save(step, small_state(step) | ema)
            if metric is not None:
                checkpointer.note(step, metric)
    shape = abstract(small_state(0)["parameters"])
    reader = CheckpointReader(run)
    expected = {None: (2,), "best": (2,), "last": (4,), "3": (3,), 1: (1,)}
    expected |= {"last:2": (4, 3), "best:2": (2, 1), "last:9": (4, 3, 2, 1)}
    for which, steps in expected.items():
        restored = reader.restore_parameters(shape, which)
        assert restored.steps == steps and restored.step == steps[0]
        np.testing.assert_allclose(restored.state["w"], 100 + np.mean(steps), rtol=1e-7)
    for which in ("best:0", "first", "last:-1", ""):
        with pytest.raises(InputError, match=r"expected last:N or best:N"):
            reader.restore_parameters(shape, which)


def test_a_step_that_is_removed_while_it_is_read_is_said(copy, monkeypatch):
    """Between its hashes and its arrays, by the training beside it; any other error stays what it is."""
    shape, step = abstract(small_state(0)["parameters"]), CheckpointReader(copy).steps()[-1]

    def fail(directory, abstract_state):
        raise ValueError("no such array")

    monkeypatch.setattr(storage, "load", fail)
    with pytest.raises(ValueError, match="no such array"):
        CheckpointReader(copy).restore_parameters(shape, "last")

    def remove(directory, abstract_state):
        shutil.rmtree(directory)
        fail(directory, abstract_state)

    monkeypatch.setattr(storage, "load", remove)
    with pytest.raises(InputError, match=rf"{step}: was removed while it was read"):
        CheckpointReader(copy).restore_parameters(shape, "last")


def test_averaging_is_done_in_float32_over_usable_checkpoints(run, caplog):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    values = np.random.default_rng(1).normal(size=(5, 64)).astype(jnp.bfloat16)
    with Checkpointer(run, keep_last=9) as checkpointer:
        for step, value in enumerate(values):
            checkpointer.save(step, {"parameters": {"w": jax.device_put(value, sharding)}})
    cut_short(run.checkpoints_path / "4")
    shape = {"w": jax.ShapeDtypeStruct((64,), jnp.bfloat16, sharding=sharding)}
    restored = CheckpointReader(run).restore_parameters(shape, "last:3")
    assert restored.steps == (3, 2, 1) and "4: damaged, not used" in caplog.text
    expected = values[1:4].astype(np.float64).mean(axis=0).astype(jnp.bfloat16)
    assert restored.state["w"].sharding == sharding
    assert_same(restored.state, {"w": expected})


def test_nothing_to_translate_with(run):
    with pytest.raises(InputError, match="holds no finished checkpoint"):
        CheckpointReader(run).restore_parameters({}, None)


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


def test_a_kill_while_a_manifest_is_written_anew_damages_nothing(copy):
    """What the kill leaves is no file of the checkpoint's, and is in nobody's way."""
    (copy.checkpoints_path / "3" / ".manifest.json.123.tmp").write_bytes(b"{")
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 3
    with Checkpointer(copy) as checkpointer:
        assert checkpointer.resume(abstract(small_state(0))).step == 3
    assert not (copy.checkpoints_path / "damaged").exists()


def test_a_best_checkpoint_whose_manifest_is_damaged_is_named(copy, caplog):
    """Also where another one takes its place before it would be tried."""
    path = copy.checkpoints_path / "1" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step"', b'"stop"', 1))
    assert CheckpointReader(copy).restore_parameters(abstract(small_state(0))["parameters"]).step == 2
    assert any("1: damaged, not used: manifest.json cannot be read" in message for message in caplog.messages)


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


def test_a_run_directory_can_be_copied_and_read_elsewhere(saved, tmp_path):
    elsewhere = shutil.copytree(saved, tmp_path / "a directory, moved")
    restored = CheckpointReader(RunDirectory.open(elsewhere)).restore(abstract(small_state(0)))
    assert_same(restored.state, small_state(3))


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


def test_a_manifest_says_what_is_there(copy):
    manifest = json.loads((copy.checkpoints_path / "3" / "manifest.json").read_bytes())
    assert manifest["step"] == 3 and manifest["metric"] == -3.0 and manifest["format"] == 1
    assert manifest["arrays"]["parameters/w"] == "float32[4,6]"
    files = {
        str(p.relative_to(copy.checkpoints_path / "3")) for p in (copy.checkpoints_path / "3").rglob("*") if p.is_file()
    }
    assert manifest["files"].keys() == files - {"manifest.json"}
