"""The text of a compiled program: written by hand, and as the compiler writes it."""

import jax
import jax.numpy as jnp
import pytest

from tfm.hlo.program import Program, arrays, dimensions, shape_bytes

LOOPS = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %p.1 = (s32[], f32[4]{0}) parameter(0)
}

%inner_condition (p.2: (s32[], f32[4])) -> pred[] {
  %p.2 = (s32[], f32[4]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less.2 = pred[] compare(%i.2, %limit), direction=LT
}

%body (p.3: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.3 = (s32[], f32[4]{0}) parameter(0)
  ROOT %inner = (s32[], f32[4]{0}) while(%p.3), condition=%inner_condition, body=%inner_body
}

%condition (p.4: (s32[], f32[4])) -> pred[] {
  %p.4 = (s32[], f32[4]{0}) parameter(0)
  ROOT %stop = pred[] custom-call(%p.4), custom_call_target="unknown"
}

%async (p.5: f32[4]) -> f32[4] {
  %p.5 = f32[4]{0} parameter(0)
  ROOT %slow = f32[4]{0} negate(%p.5)
}

ENTRY %main (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  %y = f32[4]{0} get-tuple-element(%x), index=1
  %start = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%y), calls=%async
  %done = f32[4]{0} async-done(%start), calls=%async
  ROOT %outer = (s32[], /*index=1*/f32[4]{0}) while(%x), condition=%condition, body=%body, backend_config={OUTER}
}
"""


def times(text: str) -> tuple[dict[str, int], int]:
    program = Program(text)
    executed = {instruction.name: times for _, instruction, times, _ in program.executed()}
    return executed, program.unknown_trips


def test_bodies_of_loops_in_loops_count_as_often_as_they_are_executed():
    executed, unknown = times(LOOPS.replace("{OUTER}", '{"known_trip_count":{"n":"3"}}'))
    assert unknown == 0
    assert {name: executed[name] for name in ("x", "inner", "p.1", "less.2", "p.4", "slow")} == {
        "x": 1,
        "inner": 3,
        "p.1": 15,  # its condition compares with a constant
        "less.2": 18,
        "p.4": 4,
        "slow": 1,  # though two instructions name it
    }


def test_a_loop_that_does_not_say_how_often_it_turns_is_counted_once_and_said():
    executed, unknown = times(LOOPS.replace("{OUTER}", "{}"))
    assert unknown == 1
    assert executed["p.1"] == 5


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("nothing")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,16]{1,0}", 512),
        ("bf16[3]{0:T(256)}", 6),
        ("pred[]", 1),
        ("(f32[2]{0}, (s8[5]{0}, u32[]))", 17),
        ("s4[3]{0}", 2),
        ("f8e4m3fn[7]{0}", 7),
        ("token[]", 0),
        ("f32[0,4]{1,0}", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


def test_what_lies_on_the_chip_itself_is_not_in_main_memory():
    shape = "(f32[2]{0:T(128)S(1)}, bf16[4]{0})"
    assert (shape_bytes(shape), shape_bytes(shape, in_main_memory=True)) == (16, 8)
    assert arrays(shape) == ["f32[2]{0:T(128)S(1)}", "bf16[4]{0}"]
    assert dimensions("f32[8,16]{1,0}") == [8, 16]


def test_a_real_program_is_read():
    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=7)[0]

    text = jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text()
    found = [times for _, instruction, times, _ in Program(text).executed() if instruction.opcode == "dot"]
    assert found == [7]


def test_every_branch_is_counted():
    text = """HloModule m

%yes (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %more = f32[4]{0} add(%a, %a)
}

%no (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %less = f32[4]{0} negate(%b)
}

ENTRY %main (p: pred[], i: s32[], x: f32[4]) -> f32[4] {
  %p = pred[] parameter(0)
  %i = s32[] parameter(1)
  %x = f32[4]{0} parameter(2)
  %y = f32[4]{0} conditional(%p, %x, %x), true_computation=%yes, false_computation=%no
  ROOT %z = f32[4]{0} conditional(%i, %y, %y), branch_computations={%yes, %no}
}
"""
    found = [instruction.name for _, instruction, _, _ in Program(text).executed()]
    assert found.count("more") == found.count("less") == 2
