"""Positions, embedding, norm, feed-forward block and layers against what the paper writes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import ModelConfig
from tfm.model.attention import Sight, Tokens
from tfm.model.dropout import dropout_key
from tfm.model.layers import (
    DecoderLayer,
    Embedding,
    EncoderLayer,
    FeedForward,
    LayerNorm,
    padded_vocab_size,
    sinusoids,
)
from tfm.sharding import unboxed

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
B, S, T, D = 2, 6, 5, 16


def config(**fields) -> ModelConfig:
    return ModelConfig(**{"d_model": D, "d_ff": 24, "num_heads": 2, "d_v": 4, "dropout_rate": 0.0, **fields})


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def normed(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("d_model", [4, 512])
def test_sinusoids_are_the_paper_s(d_model):
    positions = [0, 1, 2, 17, 255, 511]
    expected = np.zeros((len(positions), d_model))
    for row, position in enumerate(positions):
        for i in range(d_model // 2):
            angle = position / 10000 ** (2 * i / d_model)
            expected[row, 2 * i], expected[row, 2 * i + 1] = math.sin(angle), math.cos(angle)
    encoding = sinusoids(jnp.asarray([positions]), d_model)
    assert encoding.dtype == jnp.float32
    np.testing.assert_allclose(encoding[0], expected, atol=1e-4)


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (37_000, 37_120)])
def test_the_table_is_padded_to_a_multiple_of_128(size, padded):
    assert padded_vocab_size(size) == padded


def test_embedding_scales_and_adds_positions():
    module = Embedding(config(), 100, FLOAT32)
    tokens, positions = jnp.array([[7, 7, 99]]), jnp.array([[0, 1, 0]])
    parameters = unboxed(module.init(jax.random.key(0), tokens, positions, None)["params"])
    table = np.asarray(parameters["table"])
    assert table.shape == (128, D)
    assert table.std() == pytest.approx(D**-0.5, rel=0.05)
    out = module.apply({"params": parameters}, tokens, positions, None)
    expected = table[np.asarray(tokens)] * math.sqrt(D) + np.asarray(sinusoids(positions, D))
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT32, 1e-5), (BFLOAT16, 0.02)])
def test_logits_are_products_with_the_table_in_float32(dtype, tolerance):
    table, x = random(128, D) / 4, random(B, T, D, seed=1)
    logits = Embedding(config(), 100, dtype).apply({"params": {"table": table}}, x.astype(dtype), method="logits")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(x, np.float64) @ np.asarray(table, np.float64).T, atol=4 * tolerance)


def test_logits_of_bfloat16_products_are_not_rounded():
    """Rounded ones would often be equal, and a search would take the first of them."""
    rng = np.random.default_rng(0)
    x, table = jnp.asarray(rng.normal(size=(1, 5, 64)), jnp.bfloat16), jnp.asarray(rng.normal(size=(128, 64)))
    embedding = Embedding(ModelConfig(d_model=64, num_heads=2), 100, jnp.dtype("bfloat16"))
    logits = embedding.apply({"params": {"table": table}}, x, method="logits")
    expected = np.asarray(x, np.float64) @ np.asarray(table.astype(jnp.bfloat16), np.float64).T
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_layer_norm_is_computed_in_float32():
    """A mean far from zero takes most of what bits bfloat16 has; the variance must not be computed with the rest."""
    x = (100 + random(B, T, 256)).astype(BFLOAT16)
    parameters = {"norm": {"scale": jnp.full(256, 2.0), "bias": jnp.full(256, 0.5)}}
    y = LayerNorm(FLOAT32).apply({"params": parameters}, x)
    np.testing.assert_allclose(y, 2 * normed(x.astype(jnp.float32)) + 0.5, atol=2e-3)
    assert LayerNorm(BFLOAT16).apply({"params": parameters}, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda x: np.maximum(0, x)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("gelu", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_feed_forward_against_numpy(activation, function):
    parameters = {
        "inner": {"kernel": random(D, 24), "bias": random(24)},
        "outer": {"kernel": random(24, D, seed=1), "bias": random(D, seed=1)},
    }
    x = random(B, T, D, seed=2)
    y = FeedForward(config(activation=activation), FLOAT32).apply({"params": parameters}, x, None)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    inner = function(np.asarray(x, np.float64) @ p["inner"]["kernel"] + p["inner"]["bias"])
    np.testing.assert_allclose(y, inner @ p["outer"]["kernel"] + p["outer"]["bias"], rtol=1e-4, atol=1e-4)


def all_seen(queries: int, keys: int) -> Sight:
    where = (Tokens(jnp.ones((B, length), jnp.int32), jnp.zeros((B, length), jnp.int32)) for length in (queries, keys))
    return Sight.of(*where, causal=False)


def apply(layer: EncoderLayer | DecoderLayer, parameters, inputs, key=None) -> jax.Array:
    return jax.jit(layer.apply)({"params": parameters}, *inputs, key)


def layer_and_inputs(kind: type, **fields):
    layer = kind(config(**fields), FLOAT32)
    if kind is EncoderLayer:
        inputs = (random(B, S, D), all_seen(S, S))
    else:
        inputs = (random(B, T, D), random(B, S, D, seed=1), all_seen(T, T), all_seen(T, S))
    parameters = unboxed(jax.jit(layer.init)(jax.random.key(0), *inputs, None)["params"])
    return layer, parameters, inputs


@pytest.mark.parametrize(("kind", "blocks"), [(EncoderLayer, 2), (DecoderLayer, 3)])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_residual_surrounds_each_block(kind, blocks, norm):
    """Blocks that return nothing leave the residual stream: itself with norm before, normed a block with norm after."""
    layer, parameters, inputs = layer_and_inputs(kind, norm=norm)
    for name, part in parameters.items():
        last = part.get("output", part.get("outer"))
        assert (last is None) == name.endswith("_norm")
        if last is not None:
            last["kernel"] = jnp.zeros_like(last["kernel"])
    assert sum(not name.endswith("_norm") for name in parameters) == blocks
    expected = np.asarray(inputs[0])
    if norm == "post":
        for _ in range(blocks):
            expected = normed(expected)
    np.testing.assert_allclose(apply(layer, parameters, inputs), expected, atol=1e-5)


def test_the_norm_stands_before_or_after_the_sum():
    """One block alone, against the two formulas."""
    for norm in ("pre", "post"):
        layer, parameters, inputs = layer_and_inputs(EncoderLayer, norm=norm)
        attention = parameters["self_attention"]["output"]
        attention["kernel"] = jnp.zeros_like(attention["kernel"])
        x = np.asarray(inputs[0], np.float64)

        def block(x: np.ndarray, p=parameters["feed_forward"]) -> np.ndarray:
            p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
            inner = np.maximum(0, x @ p["inner"]["kernel"] + p["inner"]["bias"])
            return inner @ p["outer"]["kernel"] + p["outer"]["bias"]

        expected = x + block(normed(x)) if norm == "pre" else normed(normed(x) + block(normed(x)))
        np.testing.assert_allclose(apply(layer, parameters, inputs), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate", "activation_dropout_rate"])
def test_each_rate_has_its_own_effect(kind, rate):
    layer, parameters, inputs = layer_and_inputs(kind, **{rate: 0.3})
    key = dropout_key(0, jnp.int32(0), jnp.arange(B))
    with_key = apply(layer, parameters, inputs, key)
    assert np.any(with_key != apply(layer, parameters, inputs))
    plain, _, _ = layer_and_inputs(kind)
    np.testing.assert_array_equal(apply(plain, parameters, inputs, key), apply(plain, parameters, inputs))


def test_a_share_of_the_tokens_is_left_out_and_their_positions_stay():
    rows, length, rate = 40, 50, 0.25
    c = config(token_dropout_rate=rate)
    embedding = Embedding(c, 30, jnp.dtype("float32"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 30, (rows, length)))
    positions = jnp.arange(length)[None]
    parameters = unboxed(embedding.init(jax.random.key(0), tokens, positions, None))
    whole = np.asarray(embedding.apply(parameters, tokens, positions, None))
    key = dropout_key(0, jnp.int32(0), jnp.arange(rows))
    found = np.asarray(embedding.apply(parameters, tokens, positions, key))
    where = np.asarray(sinusoids(positions, D))
    dropped = np.all(found == where, axis=-1)
    assert abs(dropped.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / dropped.size)
    expected = where + np.where(dropped[..., None], 0, (whole - where) / (1 - rate))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_site_of_a_layer_draws_its_own_bits(monkeypatch):
    """Collects (site, shape) of every mask that a decoder layer draws."""
    drawn = []

    def record(x, rate, key, site):
        drawn.append(site)
        return x

    monkeypatch.setattr("tfm.model.layers.dropout", record)
    monkeypatch.setattr("tfm.model.attention.dropout", record)
    layer, parameters, inputs = layer_and_inputs(DecoderLayer)
    drawn.clear()
    jax.eval_shape(layer.apply, {"params": parameters}, *inputs, dropout_key(0, jnp.int32(0), jnp.arange(B)))
    assert len(drawn) == len(set(drawn)) == 6  # three sums, two sets of attention weights, the inner features


@pytest.mark.parametrize(("kind", "activations"), [("encoder", 8 + 2), ("decoder", 15 + 2)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_little_is_kept_for_the_backward_pass(kind, activations, activation):
    """Operands of products and what goes into norms, in the type of the products: no masks, and no float32.

    Of an encoder layer: its input, queries, keys, values, what attention gives, two sums and the norm of the first,
    each [B, S, D], and the inner projection, which here is twice as wide and counts twice.
    """
    c = config(d_model=D, d_ff=2 * D, d_v=None, dropout_rate=0.1, activation_dropout_rate=0.1, activation=activation)
    where = Tokens(jnp.ones((B, S), jnp.int32), jnp.broadcast_to(jnp.arange(S), (B, S)))
    sight = Sight.of(where, where, causal=False)
    memory = () if kind == "encoder" else (random(B, S, D, seed=1).astype(BFLOAT16),)
    sights = (sight,) if kind == "encoder" else (sight, sight)
    layer = (EncoderLayer if kind == "encoder" else DecoderLayer)(c, BFLOAT16)
    key = dropout_key(0, jnp.zeros((), jnp.int32), jnp.arange(B))
    x_BSD = random(B, S, D).astype(BFLOAT16)
    parameters = unboxed(layer.init(jax.random.key(0), x_BSD, *memory, *sights, None))

    def backward(parameters, x_BSD, memory):
        return jax.vjp(lambda p, x, m: layer.apply(p, x, *m, *sights, key), parameters, x_BSD, memory)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, parameters, x_BSD, memory))
    large = [leaf for leaf in kept if leaf.shape[:2] == (B, S) and leaf.size >= B * S * D]
    weights = [leaf for leaf in kept if leaf.shape == (B, c.num_heads, S, S)]  # of XLA's attention: kernels keep none
    assert {leaf.dtype for leaf in large} == {BFLOAT16}
    assert sum(leaf.size for leaf in large) <= activations * B * S * D
    assert weights
