"""Operations of a compiled program by the part of the model that they serve."""

import jax
import jax.numpy as jnp
import pytest

from tfm.benchmarking.profile import operation_of, part_of, profiled, time_by_part
from tfm.config import InputError

LAYER = "while/body/closed_call/layers.apply_layer/layers/layers.residual"

# An all-reduce is named after one of many that were put together.
PROGRAM = """
  %dot.1 = f32[4]{0} dot(%a, %b), metadata={op_name="jit(f)/jvp(Transformer)/decoder/self_attention/dot_general"}
  %while.2 = (f32[4]{0}, s32[]) while(%t), metadata={op_name="jit(f)/jvp(Transformer)/decoder/while"}
  ROOT %fusion.3 = (f32[4]{0}, s32[]) fusion(%a), kind=kLoop
  %all-reduce.5 = (u8[4]{0:T(2)}, u8[], u8[], u8[], u8[], /*index=5*/u8[]) all-reduce(%a), metadata={op_name="a/b"}
  add.4 = f32[] add(x, y), metadata={op_name="jit(f)/add"}
"""


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        (f"jit(_train_step)/jvp(Transformer)/Transformer.decode/decoder/{LAYER}/add", "decoder"),
        (
            f"jit(_train_step)/jvp(Transformer)/Transformer.decode/decoder/{LAYER}/cross_attention/query/dot_general",
            "decoder/cross_attention",
        ),
        (
            "jit(_train_step)/jvp(Transformer)/Transformer.decode/decoder/while/body/eval_jaxpr/layers.apply_layer/layers/"
            "layers.residual/cross_attention/div",  # since JAX 0.11
            "decoder/cross_attention",
        ),
        (
            f"jit(_train_step)/transpose(jvp(Transformer))/Transformer.encode/encoder/{LAYER}/feed_forward/inner/mul",
            "encoder/feed_forward, backward",
        ),
        ("jit(_train_step)/jvp(BCD,VD->BCV)/dot_general", "loss"),
        ("jit(_train_step)/transpose(jvp())/mul", "loss, backward"),
        ("jit(_train_step)/jvp()/while/body/closed_call/cond/branch_0_fun/jit(take_along_axis)/gather", "loss"),
        ("jit(_train_step)/jit(_where)/select_n", "update"),
        (
            "jit(_search)/shard_map/while/body/DecoderLayer.decode_step/self_attention/dot",
            "DecoderLayer/self_attention",
        ),
    ],
)
def test_the_part_of_an_operation(op_name, part):
    assert part_of(op_name) == part


@pytest.mark.parametrize(
    ("plane", "event", "stats", "operation"),
    [
        ("/host:CPU", "dot.1", (), "dot.1"),
        ("/device:GPU:0", "ampere_sgemm_128x64", (("correlation_id", 3), ("hlo_op", "custom-call.7")), "custom-call.7"),
        ("/device:GPU:0", "MemcpyD2D", (), "MemcpyD2D"),
        ("/device:TPU:0", "%fusion.3 = f32[8,128]{1,0} fusion(%p)", (), "fusion.3"),
    ],
)
def test_the_operation_of_an_event(plane, event, stats, operation):
    assert operation_of(plane, event, stats) == operation


def test_times_are_summed_by_part_of_one_run():
    durations = {"dot.1": (6.0, 4), "while.2": (9.0, 2), "fusion.3": (2.0, 2), "add.4": (2.0, 2), "python": (50.0, 1)}
    assert time_by_part(durations | {"all-reduce.5": (10.0, 2)}, PROGRAM, 2, "search") == [
        {"part": "all-reduce, waiting included", "seconds": 5.0, "share": 0.5, "operations": 1.0},
        {"part": "decoder/self_attention", "seconds": 3.0, "share": 0.3, "operations": 2.0},
        {"part": "fusion, of no known part", "seconds": 1.0, "share": 0.1, "operations": 1.0},
        {"part": "search", "seconds": 1.0, "share": 0.1, "operations": 1.0},
    ]


def test_a_long_table_ends_in_all_others():
    program = "\n".join(
        f'  %add.{n} = f32[] add(x, y), metadata={{op_name="jit(f)/module_{n}/add"}}' for n in range(40)
    )
    table = time_by_part({f"add.{n}": (1.0 + n, 1) for n in range(40)}, program, 1, "search")
    assert len(table) == 25
    assert table[-1]["part"] == "all others"
    assert table[-1]["operations"] == 16
    assert sum(row["seconds"] for row in table) == sum(range(1, 41))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile()
    with pytest.raises(InputError, match=r"--profile=.*file/trace: cannot be written"):
        profiled(tmp_path / "file" / "trace", compiled, lambda: compiled(jnp.ones(2)), 1, "search")
