"""Collectives of programs written by hand, and of a program with known ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tfm import sharding
from tfm.config import MeshConfig
from tfm.hlo.collectives import Collective, Traffic, collectives_of, traffic
from tfm.hlo.program import Program

HEAD = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (s: f32[64]) -> f32[8] {
  %s = f32[64]{0} parameter(0)
  %all = f32[64]{0} all-reduce(%s), replica_groups={}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = f32[8]{0} dynamic-slice(%all, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (x: f32[64], y: bf16[4,2]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  OPERATION
}
"""


@pytest.mark.parametrize(
    ("operation", "kind", "size", "group"),
    [
        ("ROOT %r = f32[64]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 256, 4),
        ("ROOT %r = f32[64]{0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 256, 8),
        ("%s = f32[64]{0} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, to_apply=%add\n"
         "  ROOT %d = f32[64]{0} all-reduce-done(%s)", "all-reduce", 256, 2),
        ("%s = (bf16[4,2]{1,0}, bf16[32,2]{1,0}) all-gather-start(%y), replica_groups=[1,8]<=[8], dimensions={0}\n"
         "  ROOT %d = bf16[32,2]{1,0} all-gather-done(%s)", "all-gather", 128, 8),
        ("ROOT %r = f32[8]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], to_apply=%add", "reduce-scatter", 256, 8),
        ("ROOT %r = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter", "reduce-scatter", 256, 8),
        ("ROOT %r = f32[64]{0} all-to-all(%x), replica_groups=[2,4]<=[4,2]T(1,0)", "all-to-all", 256, 4),
        ("ROOT %r = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 256, 2),
    ],
)  # fmt: skip
def test_kinds_bytes_and_groups(operation, kind, size, group):
    (found,) = collectives_of(Program(HEAD.replace("OPERATION", operation)), 8)
    assert (found.kind, found.count, found.bytes, len(found.group)) == (kind, 1, size, group)


MEGASCALE = (
    "%t = token[] after-all()\n  ROOT %r = (f32[64]{0}, u32[], token[]) send(%x, %t), channel_id=3, "
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="TARGET",_xla_megascale_transfer_type="TYPE"}'
)


def test_what_slices_say_to_one_another():
    """As a TPU's compiler writes the sum between slices of what each chip has after one within each."""
    text = MEGASCALE.replace("TARGET", "{1,2}x{0:3}").replace("TYPE", "ALL_REDUCE")
    found = collectives_of(Program(HEAD.replace("OPERATION", text)), 8)
    assert found == [Collective("all-reduce-between-slices", 1, 256.0, (0, 4))]
    text = text.replace("{1,2}", "{1,2,3,4}")
    assert collectives_of(Program(HEAD.replace("OPERATION", text)), 8)[0].group == (0, 2, 4, 6)
    for unknown in (text.replace("ALL_REDUCE", "ONE_TO_ONE"), text.replace("{1,2,3,4}", "all")):
        with pytest.raises(ValueError, match="unknown form of what slices say"):
            collectives_of(Program(HEAD.replace("OPERATION", unknown)), 8)


def test_groups_of_a_transposed_grid():
    text = HEAD.replace("OPERATION", "ROOT %r = f32[64]{0} all-to-all(%x), replica_groups=[2,4]<=[4,2]T(1,0)")
    assert collectives_of(Program(text), 8)[0].group == (0, 2, 4, 6)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", (0, 4)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", tuple(range(8))),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", (0, 2)),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", (0, 1)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5)),
    ],
)
def test_groups_along_named_axes(groups, expected):
    text = HEAD.replace(
        "OPERATION", f"ROOT %r = f32[64]{{0}} all-to-all(%x), replica_groups={groups}, dimensions={{0}}"
    )
    assert collectives_of(Program(text), 8)[0].group == expected


def test_groups_of_an_unknown_form_are_not_guessed():
    text = HEAD.replace("OPERATION", "ROOT %r = f32[64]{0} all-to-all(%x), replica_groups=ring(8)")
    with pytest.raises(ValueError, match="unknown form of groups"):
        collectives_of(Program(text), 8)


def test_one_that_goes_on_within_other_fusions_counts_where_it_starts():
    """As a TPU's compiler writes it; what is gathered twice, as for the backward pass again, has the same channel."""
    part = """%{name} (p.{name}: f32[8]) -> f32[64] {{
  %p.{name} = f32[8]{{0}} parameter(0)
  ROOT %g.{name} = f32[64]{{0}} all-gather(%p.{name}), channel_id=7, replica_groups=[1,8]<=[8], dimensions={{0}}
}}
"""
    calls = {
        "async-collective-start.1": "fused_computation.1",
        "fusion.1": "async_collective_fusion.1",
        "fusion.2": "async_collective_fusion.2",
        "async-collective-done.1": "fused_computation.2",
        "async-collective-start.2": "fused_computation.3",
        "async-collective-done.2": "fused_computation.4",
    }
    text = "".join(part.format(name=name) for name in calls.values())
    lines = "".join(f"  %{caller} = f32[64]{{0}} fusion(%z), calls=%{name}\n" for caller, name in calls.items())
    text += f"ENTRY %main (z: f32[8]) -> f32[8] {{\n  %z = f32[8]{{0}} parameter(0)\n{lines}}}\n"
    assert traffic(collectives_of(Program(text), 8)) == {"all-gather": Traffic(2, 512.0)}


def test_fused_ones_count_each_even_on_a_channel_that_they_share():
    part = """%all-reduce-scatter.{n} (p.{n}: f32[64]) -> f32[8] {{
  %p.{n} = f32[64]{{0}} parameter(0)
  %s.{n} = f32[64]{{0}} all-reduce(%p.{n}), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %d.{n} = f32[8]{{0}} slice(%s.{n}), slice={{[0:8]}}
}}
"""
    calls = "".join(f"  %f{n} = f32[8]{{0}} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.{n}\n" for n in (1, 2))
    text = "".join(part.format(n=n) for n in (1, 2))
    text += f"ENTRY %main (z: f32[64]) -> f32[64] {{\n  %z = f32[64]{{0}} parameter(0)\n{calls}}}\n"
    assert traffic(collectives_of(Program(text), 8)) == {"reduce-scatter": Traffic(2, 512.0)}


def test_a_group_of_one_says_nothing():
    text = HEAD.replace("OPERATION", "ROOT %r = f32[64]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add")
    assert collectives_of(Program(text), 8) == []


def test_traffic_is_summed_by_kind():
    found = [Collective("all-reduce", 3, 10.0, (0, 1)), Collective("all-reduce", 1, 5.0, (0, 1))]
    assert traffic([*found, Collective("all-gather", 2, 4.0, (0, 1))]) == {
        "all-reduce": Traffic(4, 35.0),
        "all-gather": Traffic(2, 8.0),
    }


def test_a_real_program_with_known_collectives():
    """Rows over data, weights over tensor: each turn of the loop sums a product over tensor."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def step(x, w):
        def turn(x, _):
            y = jax.lax.with_sharding_constraint(x @ w, place("data", None))
            return jax.lax.with_sharding_constraint(jnp.tanh(y), place("data", "tensor")), None

        return jax.lax.scan(turn, x, length=5)[0]

    places = (place("data", "tensor"), place("tensor", None))
    shapes = (jax.ShapeDtypeStruct((16, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32))
    compiled = jax.jit(step, in_shardings=places, out_shardings=places[0]).lower(*shapes).compile()
    found = collectives_of(Program(compiled.as_text()), 8)
    assert traffic(found) == {"all-reduce": Traffic(5, 5 * 8 * 64 * 4.0)}
    assert found[0].group == (0, 1, 2, 3)


def test_what_a_device_says_to_itself_is_nothing():
    for operation in (
        "ROOT %r = f32[64]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}",
        "ROOT %r = f32[64]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add",
    ):
        assert collectives_of(Program(HEAD.replace("OPERATION", operation)), 2) == []
    partly = "ROOT %r = f32[64]{0} collective-permute(%x), source_target_pairs={{0,0},{1,2},{2,1}}"
    (found,) = collectives_of(Program(HEAD.replace("OPERATION", partly)), 3)
    assert (found.kind, found.group) == ("collective-permute", (1, 2))
