"""The kernel, interpreted on a CPU, against the path that XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tfm import sharding
from tfm.config import MeshConfig, ModelConfig
from tfm.model.attention import MultiHeadAttention, Sight, Tokens, attention_mask, dot_product_attention
from tfm.model.fused_attention import fits, fused_attention

BATCH = 2


def inputs(queries: int, keys: int, heads: int, width: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    shapes = [(BATCH, queries, heads, width), *[(BATCH, keys, heads, width)] * 2, (BATCH, queries, heads, width)]
    return tuple(jnp.asarray(generator.normal(size=shape), jnp.bfloat16) for shape in shapes)


def packed(length: int, ends: list[list[int]]) -> Tokens:
    """Rows of pairs that end at these places; what follows the last is padding."""
    segments, positions = np.zeros((2, len(ends), length), np.int32)
    for row, its in enumerate(ends):
        for number, (start, end) in enumerate(zip([0, *its[:-1]], its, strict=True), 1):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    return Tokens(jnp.asarray(segments), jnp.asarray(positions))


def attend(q, k, v, target: Tokens, source: Tokens, causal: bool) -> jax.Array:
    segments, width = (target.segments_BL, source.segments_BL), q.shape[-1]
    return fused_attention(*map(flat, (q, k, v)), *segments, width=width, causal=causal).reshape(q.shape)


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "causal"),
    [(128, 128, 2, 64, True), (256, 128, 4, 32, False), (128, 256, 1, 128, False)],
)
def test_outputs_and_gradients_are_those_of_the_plain_path(queries, keys, heads, width, causal):
    q, k, v, out_gradient = inputs(queries, keys, heads, width)
    target = packed(queries, [[50, 51, queries - 7], [queries]])
    source = target if causal else packed(keys, [[10, 90, keys], [keys - 20]])
    weights = (target.segments_BL > 0)[:, :, None, None]  # what padding gives, nobody looks at

    def plain(q, k, v):
        mask = attention_mask(target, source, causal=causal)
        return jnp.where(weights, dot_product_attention(q, k, v, mask), 0)

    def fused(q, k, v):
        return jnp.where(weights, attend(q, k, v, target, source, causal), 0)

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    wanted, back = jax.vjp(plain, *exact)
    with pltpu.force_tpu_interpret_mode():
        found, fused_back = jax.vjp(fused, q, k, v)
        gradients = fused_back(out_gradient)
    rounded, rounded_back = jax.vjp(plain, q, k, v)
    of_plain = [rounded, *rounded_back(out_gradient)]
    of_exact = [wanted, *back(out_gradient.astype(jnp.float32))]
    for exact, by_xla, by_kernel in zip(of_exact, of_plain, [found, *gradients], strict=True):
        error, allowed = (np.linalg.norm(np.asarray(x, np.float32) - exact) for x in (by_kernel, by_xla))
        assert error <= max(1.5 * allowed, 1e-3 * np.linalg.norm(exact))  # no further off than bfloat16 always is
        assert np.linalg.norm(exact) > 1


def test_each_device_of_a_mesh_takes_its_rows_and_heads():
    q, k, v, _ = inputs(128, 128, 4, 64)
    where = packed(128, [[60, 128], [100]])

    def on_devices(*qkv):
        return attend(*qkv, where, where, causal=True)

    with pltpu.force_tpu_interpret_mode():
        alone = on_devices(q, k, v)
        with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])):
            split = jax.jit(on_devices)(q, k, v)
    np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(split, np.float32))


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "expected"),
    [
        (128, 256, 8, 64, True),
        (128, 128, 16, 128, True),
        (100, 128, 8, 64, False),  # not whole tiles
        (128, 1024, 8, 64, False),  # scores too large for the chip
        (128, 128, 1, 64, False),  # half a tile
        (128, 128, 8, 48, False),
    ],
)
def test_sizes_that_fit(queries, keys, heads, width, expected):
    q, k, v, _ = inputs(queries, keys, heads, width)
    assert fits(*map(flat, (q, k, v)), width) is expected
    assert not fits(*(flat(x).astype(jnp.float32) for x in (q, k, v)), width)


def test_widths_of_values_and_heads_of_a_device_count():
    q, k, v, _ = inputs(128, 128, 4, 64)
    assert not fits(*map(flat, (q, k, v[..., :32])), 64)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, tensor=4))):  # one head of 64 features on each
        assert not fits(*map(flat, (q, k, v)), 64)


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_tells_the_kernel_what_it_sees(causal):
    target = packed(128, [[50, 51, 121], [128]])
    source = target if causal else packed(128, [[10, 90, 128], [108]])
    x, memory = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 128, 128)), jnp.bfloat16) for i in range(2))
    memory = x if causal else memory
    layer = MultiHeadAttention(ModelConfig(d_model=128, num_heads=2), jnp.dtype("bfloat16"))
    sights = [Sight.of(target, source, causal=causal, kernel=kernel) for kernel in ("plain", "pallas")]
    parameters = layer.init(jax.random.key(0), x, memory, sights[0], None, 0)
    is_real = np.asarray(target.segments_BL > 0)[..., None]
    with pltpu.force_tpu_interpret_mode():
        outputs = (layer.apply(parameters, x, memory, sight, None, 0) for sight in sights)
        plain, fused = (np.asarray(output, np.float32) * is_real for output in outputs)
    np.testing.assert_allclose(fused, plain, atol=0.03)
