"""Restoring: the newest step that is whole, the one asked for, parameters alone and their mean; and what is refused."""

import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.checkpoint.states import abstract, assert_same, cut_short, flip_bit, listing, small_state
from tfm import hosts
from tfm.checkpoint import Checkpointer, CheckpointReader, RunDirectory, storage
from tfm.config import InputError


def test_metadata_and_metric_come_back(copy):
    restored = CheckpointReader(copy).restore(abstract(small_state(0)))
    assert (restored.step, restored.metadata, restored.metric) == (3, {"corpus": "abc"}, -3.0)


@pytest.mark.parametrize("late", ["manifest.json", "parameters"])
def test_a_host_to_which_the_disk_shows_the_newest_step_late_waits_for_it(copy, monkeypatch, late):
    directory = copy.checkpoints_path / "3"
    (directory / late).rename(directory / f"{late}.not-shown")
    monkeypatch.setattr(hosts, "agreed", lambda value: [3, 2, 1] if isinstance(value, list) else True)
    timer = threading.Timer(0.3, lambda: (directory / f"{late}.not-shown").rename(directory / late))
    timer.start()
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 3
    flip_bit(directory)
    monkeypatch.setattr(hosts, "wait_until", lambda seen: pytest.fail("waits for what will not be otherwise"))
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 2


def test_a_new_run_has_nothing_to_restore(run):
    assert CheckpointReader(run).restore(abstract(small_state(0))) is None
    assert Checkpointer(run).resume(abstract(small_state(0))) is None


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


def test_a_best_checkpoint_whose_manifest_is_damaged_is_named(copy, caplog):
    """Also where another one takes its place before it would be tried."""
    path = copy.checkpoints_path / "1" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step"', b'"stop"', 1))
    assert CheckpointReader(copy).restore_parameters(abstract(small_state(0))["parameters"]).step == 2
    assert any("1: damaged, not used: manifest.json cannot be read" in message for message in caplog.messages)


def test_a_run_directory_can_be_copied_and_read_elsewhere(saved, tmp_path):
    elsewhere = shutil.copytree(saved, tmp_path / "a directory, moved")
    restored = CheckpointReader(RunDirectory.open(elsewhere)).restore(abstract(small_state(0)))
    assert_same(restored.state, small_state(3))


def test_the_best_are_of_those_that_were_evaluated(run):
    with Checkpointer(run, keep_last=9) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, small_state(step))
            if step < 3:
                checkpointer.note(step, float(step))
    parameters = abstract(small_state(0)["parameters"])
    assert CheckpointReader(run).restore_parameters(parameters, "best:3").steps == (2, 1)


def test_a_step_under_another_number_is_damaged(copy):
    (copy.checkpoints_path / "3").rename(copy.checkpoints_path / "30")
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 2
