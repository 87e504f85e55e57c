"""Stages of compilation, spreads of times, memory and collectives of a compiled program."""

import types

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tfm.benchmarking import programs


def test_a_program_compiled_in_stages_is_the_function():
    compiled, seconds = programs.compiled_in_stages(jax.jit(lambda x: 2 * x), jnp.arange(3.0))
    assert compiled(jnp.arange(3.0)).tolist() == [0, 2, 4]
    assert all(stage > 0 for stage in seconds.values())
    assert programs.stage_seconds(1.0, 2.0, 4.0) == {
        **{"compile_seconds": 7, "compile_trace_seconds": 1, "compile_lower_seconds": 2, "compile_backend_seconds": 4}
    }


def test_spread_is_of_percentiles():
    found = programs.spread("step", [float(n) for n in range(11)])
    assert found == {"step_seconds_median": 5, "step_seconds_p10": 1, "step_seconds_p90": 9}


def test_flops_are_those_of_the_products():
    a = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    b = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    assert programs.lowered_flops(jax.jit(jnp.matmul).lower(a, b)) == 2 * 8 * 16 * 4


def test_what_cannot_be_counted_is_none():
    def refuse():
        raise NotImplementedError

    assert programs.lowered_flops(types.SimpleNamespace(cost_analysis=refuse)) is None
    assert programs.lowered_flops(types.SimpleNamespace(cost_analysis=lambda: {"flops": -1.0})) is None


def test_collectives_are_counted_by_kind():
    where = NamedSharding(Mesh(jax.devices()[:2], ("x",)), PartitionSpec("x"))
    whole = NamedSharding(where.mesh, PartitionSpec())
    compiled = jax.jit(jnp.sum, in_shardings=where, out_shardings=whole).lower(jnp.ones(8)).compile()
    assert programs.collectives(compiled, 2) == {"all-reduce": 1}


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    where = NamedSharding(Mesh(jax.devices()[:2], ("x",)), PartitionSpec("x"))

    def loop(x):
        return jax.lax.scan(lambda total, _: (total + jnp.sum(jnp.sin(x * total)), None), 1.0, length=5)[0]

    compiled = jax.jit(loop, in_shardings=where).lower(jnp.ones(8)).compile()
    assert programs.collectives(compiled, 2) == {"all-reduce": 5}


def test_what_is_not_understood_costs_no_benchmark(caplog):
    text = """HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} all-reduce(%x), replica_groups=something
}
"""
    assert programs.collectives(types.SimpleNamespace(as_text=lambda: text), 2) is None
    assert "collectives are not counted: unknown form of groups" in caplog.text


def test_memory_is_the_device_s_where_it_counts():
    compiled, _ = programs.compiled_in_stages(jax.jit(lambda x: x + 1), jnp.ones(1024))
    silent, counting, fuller, elsewhere = (
        types.SimpleNamespace(memory_stats=lambda value=value: value, process_index=host)
        for value, host in (
            (None, 0),
            ({"peak_bytes_in_use": 5}, 0),
            ({"peak_bytes_in_use": 7}, 0),
            ({"peak_bytes_in_use": 9}, 1),
        )
    )
    found = programs.memory(compiled, [silent])
    assert found["peak_device_memory_source"] == "program"
    assert found["peak_device_memory_bytes"] == found["program_memory_bytes"] >= 8 * 1024
    found = programs.memory(compiled, [counting, fuller, elsewhere])
    assert (found["peak_device_memory_source"], found["peak_device_memory_bytes"]) == ("device", 7)


def test_the_largest_power_of_two_below_a_number():
    asked = []

    def fits(number):
        asked.append(number)
        return number <= 5

    assert programs.largest_power_of_two(64, fits) == 4 and asked == [32, 16, 8, 4]
    assert programs.largest_power_of_two(65, lambda number: True) == 64
    assert programs.largest_power_of_two(1, lambda number: True) is None
    assert programs.largest_power_of_two(8, lambda number: False) is None
