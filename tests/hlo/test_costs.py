"""FLOPs and bytes by hand, and of the train step with its layers in a loop and side by side."""

import jax
import jax.numpy as jnp
import pytest

from tfm import sharding
from tfm.config import MeshConfig
from tfm.hlo.costs import bytes_accessed, copied_bytes_by_xla, flops
from tfm.hlo.program import Program
from tfm.model.flops import train_step_flops
from tfm.planning.compiled import compile_train_step
from tfm.training.step import trainer_of

FUSIONS = """HloModule m

%take (p0: f32[6,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[6,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
}

%put (q0: f32[6,100], q1: f32[1,100], q2: s32[]) -> f32[6,100] {
  %q0 = f32[6,100]{1,0} parameter(0)
  %q1 = f32[1,100]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %all = f32[6,100]{1,0} dynamic-update-slice(%q0, %q1, %q2, %zero.1)
}

ENTRY %main (x: f32[6,100], i: s32[]) -> f32[6,100] {
  %x = f32[6,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %taken = f32[1,100]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%take
  %twice = f32[1,100]{1,0:T(8,128)S(1)} add(%taken, %taken)
  ROOT %kept = f32[6,100]{1,0} fusion(%x, %twice, %i), kind=kLoop, calls=%put
}
"""

CONVOLUTION = """HloModule m

ENTRY %main (x: bf16[4,32,16], w: bf16[16,8]) -> bf16[4,32,8] {
  %x = bf16[4,32,16]{2,1,0} parameter(0)
  %w = bf16[1,16,8]{2,1,0} parameter(1)
  ROOT %y = bf16[4,32,8]{2,1,0} convolution(%x, %w), window={size=1}, dim_labels=b0f_0io->b0f
}
"""

BATCHED = """HloModule m

ENTRY %main (x: bf16[4,32,16], w: bf16[4,8,16]) -> bf16[4,32,8] {
  %x = bf16[4,32,16]{2,1,0} parameter(0)
  %w = bf16[4,8,16]{2,1,0} parameter(1)
  ROOT %y = bf16[4,32,8]{2,1,0} convolution(%x, %w), WINDOW, dim_labels=0bf_0oi->0bf
}
""".replace("WINDOW", "window={size=4 stride=3 pad=0_0 lhs_dilate=4}")


def test_of_a_slice_the_slice_counts_and_of_an_update_the_update():
    once, total = bytes_accessed(Program(FUSIONS))
    assert once == total == (400 + 4 + 400) + 3 * 400 + (400 + 4 + 400)
    # On the chip itself: what was taken, its double, and the reading of that. Numbers of places are in main memory.
    assert bytes_accessed(Program(FUSIONS), in_main_memory=True)[1] == (400 + 4) + (4 + 400)


def test_copies_between_memories_count_once():
    text = """HloModule m

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %start = (f32[100]{0:T(128)S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%x)
  ROOT %done = f32[100]{0:T(128)S(1)} copy-done(%start)
}
"""
    assert bytes_accessed(Program(text))[1] == 800
    assert bytes_accessed(Program(text), in_main_memory=True)[1] == 400
    assert copied_bytes_by_xla(Program(text)) == 4 * 400


SLICES = """HloModule m

ENTRY %main (x: f32[6,100], i: s32[]) -> f32[6,100] {
  %x = f32[6,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %taken = f32[1,100]{1,0:T(8,128)S(1)} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %kept = f32[6,100]{1,0} dynamic-update-slice(%x, %taken, %i, %zero)
}
"""


def test_slices_between_memories_count_where_they_are_read_and_written():
    assert bytes_accessed(Program(SLICES))[1] == 4 * 400
    assert bytes_accessed(Program(SLICES), in_main_memory=True)[1] == 2 * 400


GATHER = """HloModule m

ENTRY %main (x: f32[1,100]) -> f32[4,100] {
  %x = f32[1,100]{1,0} parameter(0)
  GATHER
}
"""


def test_a_collective_moves_the_same_whether_it_is_waited_for_or_not():
    at_once = "ROOT %all = f32[4,100]{1,0} all-gather(%x), dimensions={0}"
    later = """%start = (f32[1,100]{1,0}, f32[4,100]{1,0}) all-gather-start(%x), dimensions={0}
  ROOT %all = f32[4,100]{1,0} all-gather-done(%start)"""
    for text in (at_once, later):
        assert bytes_accessed(Program(GATHER.replace("GATHER", text)))[1] == 400 + 1600


def test_products_that_a_tpu_writes_as_convolutions():
    assert flops(Program(CONVOLUTION))[1] == 2 * 4 * 32 * 8 * 16
    # A batch as a dilated window: of the four places of each window, but one meets an input.
    assert flops(Program(BATCHED))[1] == 2 * 4 * 32 * 8 * 16


def test_products_in_a_loop_count_as_often_as_they_are_made():
    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=7)[0]

    once, total = flops(Program(jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text()))
    assert once == pytest.approx(2 * 8**3, rel=0.01)  # beside the product, the loop's own counting
    assert total == pytest.approx(7 * 2 * 8**3, rel=0.01)


KERNEL = """HloModule m

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"config":CONFIG}
}

%condition (z: f32[8]) -> pred[] {
  %z = f32[8]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  ROOT %end = f32[8]{0} while(%w), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
""".replace("CONFIG", '{"body":"","cost_estimate":{"flops":"1000","transcendentals":"1","bytes_accessed":"64"}}')


def test_kernels_in_a_loop_count_as_often_as_they_run():
    """With what they declare: nobody else can know."""
    assert flops(Program(KERNEL)) == (1000, 6000)


def test_layers_in_a_loop_and_side_by_side_have_the_same_flops(tiny_config):
    """And the formula's; with micro-batches, and the loss in pieces, which are loops as well."""
    counted = {}
    for unroll in (1, 2):
        changes = {f"model.{side}_layers": 2 for side in ("encoder", "decoder")}
        changes |= {"model.d_model": 32, "model.d_ff": 128, "training.gradient_accumulation": 2}
        config = tiny_config({**changes, "training.unroll_layers": unroll})
        trainer = trainer_of(config, config.data.vocab_size, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
        trainer.logits_per_chunk //= 2**6 if unroll == 1 else 1
        counted[unroll] = compile_train_step(trainer).counts
    assert counted[1].unknown_loops == counted[2].unknown_loops == 0
    assert counted[1].flops == pytest.approx(counted[2].flops, rel=0.02)
    formula = train_step_flops(config.model, 300, 8, 32, 32)
    assert 0.98 * formula < counted[2].flops < 2 * formula  # a narrow model has much beside its products


def test_elementwise_flops_are_those_of_xla():
    compiled = jax.jit(lambda x: jnp.sum(jnp.maximum(x * x + 1.0, 3.0), axis=0)).lower(jnp.ones((64, 32))).compile()
    assert flops(Program(compiled.as_text()))[1] == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


NESTED = """HloModule m

%row (r0: f32[1,600], r1: s32[]) -> f32[1,100] {
  %r0 = f32[1,600]{1,0} parameter(0)
  %r1 = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %part = f32[1,100]{1,0} dynamic-slice(%r0, %none, %r1), dynamic_slice_sizes={1,100}
}

%both (p0: f32[6,100], p1: s32[]) -> (f32[1,100], f32[6,100]) {
  %p0 = f32[6,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %flat = f32[1,600]{1,0} bitcast(%p0)
  %one = f32[1,100]{1,0} fusion(%flat, %p1), kind=kLoop, calls=%row
  %zero = s32[] constant(0)
  %updated = f32[6,100]{1,0} dynamic-update-slice(%p0, %one, %p1, %zero)
  %viewed = f32[6,100]{1,0} bitcast(%updated)
  ROOT %results = (f32[1,100]{1,0}, f32[6,100]{1,0}) tuple(%one, %viewed)
}

ENTRY %main (x: f32[6,100], i: s32[]) -> (f32[1,100], f32[6,100]) {
  %x = f32[6,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %made = (f32[1,100]{1,0}, f32[6,100]{1,0}) fusion(%x, %i), kind=kLoop, calls=%both
}
"""


def test_slices_and_updates_are_seen_through_views_and_fusions_within_fusions():
    """A row is read, and written twice: as one of two results, and as the update of the other."""
    assert bytes_accessed(Program(NESTED))[1] == 400 + 4 + 400 + 400


def test_a_gather_reads_what_it_takes():
    text = """HloModule m

ENTRY %main (x: f32[60,100], i: s32[2,1]) -> f32[2,100] {
  %x = f32[60,100]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  ROOT %rows = f32[2,100]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,100}
}
"""
    assert bytes_accessed(Program(text))[1] == 2 * 800


def test_a_slice_that_is_copied_counts_thrice_with_xla():
    text = """HloModule m

ENTRY %main (x: f32[100]) -> f32[10] {
  %x = f32[100]{0} parameter(0)
  %start = ((f32[100]{0}), f32[10]{0:S(1)}, u32[]) slice-start(%x), slice={[0:10]}
  ROOT %done = f32[10]{0:S(1)} slice-done(%start)
}
"""
    assert copied_bytes_by_xla(Program(text)) == 3 * 40
    assert bytes_accessed(Program(text))[1] == 2 * 40


def test_a_dilated_kernel_meets_less_of_its_input():
    """Two taps, three apart, at three places: of six, four meet an element, and two the padding."""
    text = """HloModule m

ENTRY %main (x: f32[1,4,8], w: f32[2,8,16]) -> f32[1,3,16] {
  %x = f32[1,4,8]{2,1,0} parameter(0)
  %w = f32[2,8,16]{2,1,0} parameter(1)
  ROOT %y = f32[1,3,16]{2,1,0} convolution(%x, %w), window={size=2 pad=1_1 rhs_dilate=3}, dim_labels=b0f_0io->b0f
}
"""
    taps = sum(0 <= place + 3 * tap - 1 < 4 for place in range(3) for tap in range(2))
    assert taps == 4
    assert flops(Program(text))[1] == 2 * taps * 8 * 16
