"""Plans for the devices at hand, and for a slice of TPUs whose place simulated devices take."""

import itertools
from importlib.util import find_spec

import jax
import pytest

from tfm.config import ConfigError, InputError, MeshConfig
from tfm.model.flops import train_step_flops
from tfm.planning import plan as planning
from tfm.planning.compiled import OutOfMemory
from tfm.planning.plan import mesh_of, plan_for, plan_here, refuse_what_does_not_fit, scaled, sweep
from tfm.planning.topology import topology_of

SLICE = topology_of("v5e:2x4")


@pytest.fixture
def simulated(monkeypatch):
    """Simulated devices in the place of those of a slice."""
    monkeypatch.setattr(planning, "devices_of", lambda topology: jax.devices())
    places = list(itertools.product(range(2), range(4)))
    monkeypatch.setattr(planning, "coordinates_of", lambda devices, topology: places)


def test_a_plan_for_the_devices_at_hand(tiny_config):
    config = tiny_config()
    plan = plan_here(config)
    assert plan["flops_per_step"] == train_step_flops(config.model, 300, 8, 32, 32)
    assert (plan["chips"], plan["rows_per_step"], plan["target_tokens_per_step"]) == (8, 8, 256)
    memory = plan["memory_per_chip"]
    assert memory["total_bytes"] == sum(memory.values()) - memory["total_bytes"] - memory["available_bytes"]
    assert plan["fits"]


def test_rows_per_chip_scale_the_batch(tiny_config):
    assert scaled(tiny_config(), None, 8).rows_per_batch == 8
    assert scaled(tiny_config(), 3, 16).rows_per_batch == 48


def test_a_plan_for_a_slice(tiny_config, simulated):
    # Each with tables of its own: a CPU's compiler sums each gradient of one that is used three times by itself.
    config = tiny_config({"model.tie_embeddings": "none"})
    plan = plan_for(config, SLICE, rows_per_chip=2)
    assert plan["topology"] == "v5e:2x4"
    assert plan["rows_per_step"] == 16
    assert plan["fits"]
    assert plan["flops_per_chip_by_formula"] == plan["flops_per_step"] / 8
    assert plan["flops_by_xla_over_formula"] > 1
    assert plan["bytes_accessed_per_target_token"] == plan["bytes_accessed_per_chip"] / 64
    assert set(plan["collectives"]) == set(plan["collective_bytes_by_formula"]) == {"all-reduce"}
    summed = plan["collectives"]["all-reduce"]["bytes"]
    assert summed == pytest.approx(plan["collective_bytes_by_formula"]["all-reduce"], rel=0.1)
    times = [plan[f"{part}_seconds"] for part in ("compute", "memory", "interconnect")]
    assert plan["predicted_step_seconds"] == max(times)
    assert plan["predicted_step_seconds_as_sum"] == pytest.approx(sum(times))
    # Of float32, a product of which is six of bfloat16.
    assert times[0] == pytest.approx(plan["flops_per_chip_by_xla"] * 6 / SLICE.chip.peak_flops)
    assert times[2] == pytest.approx(2 * 7 / 8 * summed / (2 * SLICE.chip.link_bandwidth))
    assert plan["predicted_target_tokens_per_second"] == 512 / max(times)
    memory = plan["memory_per_chip"]
    assert memory["total_bytes"] == pytest.approx(
        sum(memory.values()) - memory["total_bytes"] - memory["available_bytes"]
    )
    assert plan["decode"]["fits_beside_train_state"]
    assert plan["decode"]["collectives"] == {}


def test_a_model_that_does_not_fit_says_by_how_much_and_what_to_change(tiny_config, simulated, monkeypatch):
    def refuse(trainer):
        raise OutOfMemory(20.5 * 2**30, 15.75 * 2**30)

    monkeypatch.setattr(planning, "compile_train_step", refuse)
    plan = plan_for(tiny_config(), SLICE, rows_per_chip=2)
    assert plan["fits"] is False
    assert plan["lacking_bytes"] == 4.75 * 2**30
    with pytest.raises(InputError, match=r"v5e:2x4: does not fit.*15\.75 GiB lacks 4\.75 GiB.*training\.remat=dots"):
        refuse_what_does_not_fit([plan])
    assert "mesh.fsdp=8 with mesh.data=-1" in plan["remedy"]
    with pytest.raises(InputError, match=r"lacks 0\.75 GiB"):  # the nearest of several
        refuse_what_does_not_fit([plan, plan | {"lacking_bytes": 0.75 * 2**30}])
    refuse_what_does_not_fit([plan, {"fits": True}])


@pytest.mark.parametrize(
    ("changes", "rows", "ways"),
    [
        ({}, 3, "try training.remat=dots or mesh.fsdp=8 with mesh.data=-1 or fewer"),  # 3 rows have no halves
        ({"mesh.slices": 2}, 2, "training.gradient_accumulation=2 or training.remat=dots or mesh.fsdp=4 with"),
        ({"mesh.data": 1, "mesh.tensor": 8}, 2, "training.gradient_accumulation=2 or training.remat=dots or fewer"),
    ],
)
def test_what_is_advised_can_be_followed(changes, rows, ways, tiny_config, simulated):
    sizes = {"model.num_heads": 8, "model.d_model": 64, "model.d_ff": 64}
    trainer = planning.trainer_on(tiny_config(sizes | changes), SLICE, rows_per_chip=rows)
    assert ways in planning._remedy(trainer)


def test_a_mesh_that_does_not_multiply_is_refused(tiny_config, simulated):
    with pytest.raises(ConfigError, match=r"mesh\.data=3.*needs 3 devices, and there are 8"):
        plan_for(tiny_config({"mesh.data": 3}), SLICE)


def test_a_batch_too_small_for_the_slice_names_the_option_that_scales_it(tiny_config, simulated):
    with pytest.raises(InputError, match=r"3 rows, too few for 8 pieces.*--rows_per_chip=32"):
        plan_for(tiny_config({"training.target_tokens_per_batch": 96}), SLICE)


def test_a_sweep_is_checked_before_anything_is_compiled(tiny_config, simulated, monkeypatch):
    compiled = []
    monkeypatch.setattr(planning, "plan_for", lambda config, where, rows: compiled.append(config.mesh.tensor))
    list(sweep(tiny_config(), [SLICE], [MeshConfig(), MeshConfig(-1, 1, 2)]))
    assert compiled == [1, 2]
    with pytest.raises(ConfigError, match=r"mesh\.tensor=3"):
        list(sweep(tiny_config(), [SLICE], [MeshConfig(), MeshConfig(-1, 1, 3)]))
    assert compiled == [1, 2]


def test_meshes_as_they_are_typed():
    assert mesh_of("-1,4,1") == MeshConfig(-1, 4, 1)
    for text in ("4", "1,2", "a,b,c", "1,2,3,4"):
        with pytest.raises(InputError, match="expected data,fsdp,tensor"):
            mesh_of(text)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu: requirements-tpu.txt")
def test_a_plan_by_the_tpu_compiler(tiny_config):
    plan = plan_for(tiny_config(), topology_of("v5e:2x2"), rows_per_chip=8)
    assert plan["fits"]
    assert plan["collectives"]["all-reduce"]["bytes"] == pytest.approx(
        plan["collective_bytes_by_formula"]["all-reduce"], rel=0.1
    )


@pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu: requirements-tpu.txt")
def test_a_plan_of_two_slices_by_the_tpu_compiler(tiny_config):
    """Gradients that each chip of a slice has a part of cross the network once."""
    sizes = {"model.d_model": 256, "model.d_ff": 1024}  # of which the padding of what is sent is a small part
    config = tiny_config({**sizes, "mesh.slices": 2, "mesh.fsdp": 4, "model.tie_embeddings": "none"})
    plan = plan_for(config, topology_of("v5e:2x2"), rows_per_chip=8)
    assert (plan["slices"], plan["chips"], plan["mesh"]) == (2, 8, {"data": 2, "fsdp": 4, "tensor": 1})
    between = "all-reduce-between-slices"
    crossing = plan["collectives"][between]["bytes"]
    assert crossing == pytest.approx(plan["collective_bytes_by_formula"][between], rel=0.1)
    network = plan["network_seconds"]
    assert network == pytest.approx(crossing / topology_of("v5e:2x2").chip.network_bandwidth)
    assert plan["predicted_step_seconds"] >= network > 0
    assert plan["decode"]["collectives"] == {}
