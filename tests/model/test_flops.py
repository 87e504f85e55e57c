"""The formula against a count by hand, and against what the compiler counts in the matrix products."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from tfm.config import ModelConfig
from tfm.model import transformer
from tfm.model.flops import decode_step_flops, forward_flops, prefill_flops, train_step_flops
from tfm.model.transformer import Transformer, init_parameters

CONFIG = ModelConfig(d_model=32, d_ff=64, num_heads=4, d_k=8, d_v=16, encoder_layers=1, decoder_layers=2)
VOCAB, ROWS, SOURCE, TARGET = 100, 3, 10, 12


def test_forward_by_hand():
    d, f, h, k, v, padded = 32, 64, 4, 8, 16, 128
    encoder = SOURCE * (2 * d * h * k * 2 + 2 * d * h * v * 2 + 4 * d * f) + 2 * SOURCE * SOURCE * h * (k + v)
    own = TARGET * (2 * d * h * k * 2 + 2 * d * h * v * 2) + 2 * TARGET * TARGET * h * (k + v)
    cross = (TARGET + SOURCE) * (2 * d * h * k + 2 * d * h * v) + 2 * TARGET * SOURCE * h * (k + v)
    decoder = own + cross + TARGET * 4 * d * f
    expected = ROWS * (encoder + 2 * decoder + TARGET * 2 * d * padded)
    assert forward_flops(CONFIG, VOCAB, ROWS, SOURCE, TARGET) == expected
    assert train_step_flops(CONFIG, VOCAB, ROWS, SOURCE, TARGET) == 3 * expected


def test_the_base_model_needs_six_flops_a_parameter_and_token():
    """Of 63 million parameters, each token of either side meets its own stack's; the known rule of thumb."""
    config = ModelConfig()
    flops = train_step_flops(config, 37_000, 1, 1, 1)
    assert flops == pytest.approx(6 * 63.1e6, rel=0.02)


def dot_flops(function, *arguments) -> float:
    """Twice the multiplications of all `dot_general` of a traced function; loops do not occur."""
    total = 0.0
    closed = [jax.make_jaxpr(function)(*arguments).jaxpr]
    while closed:
        for equation in closed.pop().eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += 2.0 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
            inner = [getattr(p, "jaxpr", p) for p in equation.params.values()]
            closed += [p for p in inner if hasattr(p, "eqns")]
    return total


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_against_the_products_that_are_traced(beams):
    config = dataclasses.replace(CONFIG, encoder_layers=3)
    model = Transformer(config, VOCAB)
    parameters = transformer.unstack(init_parameters(model, 0))
    sources = jnp.ones((ROWS, SOURCE), jnp.int32)

    def start(parameters, sources):
        return transformer.start_decoding(model, parameters, sources, sources > 0, beams=beams, length=TARGET)

    assert dot_flops(start, parameters, sources) == prefill_flops(config, ROWS, SOURCE)
    cache = jax.eval_shape(start, parameters, sources)
    step = dot_flops(
        lambda p, t, c: transformer.decode_step(model, p, t, c), parameters, jnp.ones((ROWS, beams), jnp.int32), cache
    )
    assert step == decode_step_flops(config, VOCAB, ROWS, beams, SOURCE, TARGET)
