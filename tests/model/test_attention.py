"""Attention against NumPy in float64, and the masks it builds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import ModelConfig
from tfm.model.attention import (
    MultiHeadAttention,
    Sight,
    Tokens,
    attend_once,
    attention_mask,
    dot_product_attention,
)
from tfm.model.dropout import dropout_key
from tfm.model.transformer import Transformer, init_parameters

B, T, S, H, D_K, D_V = 3, 7, 9, 4, 8, 5

# Two pairs and padding; one pair that fills the row; three pairs of which the second has no source token.
TARGET_SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 3, 3, 3, 0]], np.int32)
SOURCE_SEGMENTS = np.array(
    [[1, 1, 2, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 3, 3, 3, 3, 3, 0]], np.int32
)


def tokens(segments: np.ndarray) -> Tokens:
    """Positions restart with each segment."""
    starts = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(segments.shape[1]), 0), 1
    )
    return Tokens(jnp.asarray(segments), jnp.asarray(np.arange(segments.shape[1])[None] - starts, jnp.int32))


def reference_mask(query_segments: np.ndarray, key_segments: np.ndarray, causal: bool) -> np.ndarray:
    """Pair by pair; with `causal`, queries and keys are the same tokens, so places stand for positions."""
    mask = np.zeros((*query_segments.shape, key_segments.shape[1]), bool)
    for b, t, s in np.ndindex(mask.shape):
        mask[b, t, s] = query_segments[b, t] == key_segments[b, s] and not (causal and s > t)
    return mask


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Equation 1 in float64, one query at a time, over the keys that it may see."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, h] @ q[b, t, h] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, h]
    return out


def random(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_against_loops(causal):
    queries = tokens(TARGET_SEGMENTS)
    keys, key_segments = (queries, TARGET_SEGMENTS) if causal else (tokens(SOURCE_SEGMENTS), SOURCE_SEGMENTS)
    mask = attention_mask(queries, keys, causal=causal)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, reference_mask(TARGET_SEGMENTS, key_segments, causal))


def test_causality_goes_by_position_in_the_pair():
    """Tokens of one pair that do not stand side by side still see each other in the order of their positions."""
    where = Tokens(jnp.array([[1, 2, 1, 2]]), jnp.array([[1, 0, 0, 1]]))
    mask = attention_mask(where, where, causal=True)[0]
    np.testing.assert_array_equal(mask, np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]], bool))


@pytest.mark.parametrize("d_v", [D_K, D_V])
@pytest.mark.parametrize("kind", ["all", "causal", "cross"])
def test_dot_product_attention_against_numpy(kind, d_v):
    if kind == "cross":
        mask = reference_mask(TARGET_SEGMENTS, SOURCE_SEGMENTS, False)
        mask[~mask.any(-1)] = True  # rows with no key at all have a test of their own
    elif kind == "causal":
        mask = reference_mask(TARGET_SEGMENTS, TARGET_SEGMENTS, True)
    else:
        mask = np.ones((B, T, S), bool)
    keys = mask.shape[-1]
    # Scores of several tens, so that the softmax is far from even and a missing maximum would show.
    q, k, v = 4 * random(B, T, H, D_K), 4 * random(B, keys, H, D_K, seed=1), random(B, keys, H, d_v, seed=2)
    out = dot_product_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask))
    assert out.shape == (B, T, H, d_v) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference_attention(q, k, v, mask), atol=2e-5)


def test_a_query_with_no_key_gives_a_number():
    q, k, v = random(1, 1, H, D_K), random(1, S, H, D_K), random(1, S, H, D_V)

    def total(q: jax.Array) -> jax.Array:
        out = dot_product_attention(q, jnp.asarray(k), jnp.asarray(v), jnp.zeros((1, 1, S), bool))
        return jnp.sum(out)

    value, gradient = jax.value_and_grad(total)(jnp.asarray(q))
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


def test_a_masked_key_has_no_influence_at_all():
    q, k, v = (jnp.asarray(random(1, 4, H, D_K, seed=i)) for i in range(3))
    mask = jnp.ones((1, 4, 4), bool).at[..., 2].set(False)
    out = dot_product_attention(q, k, v, mask)
    changed = dot_product_attention(q, k.at[:, 2].set(1e4), v.at[:, 2].set(-1e4), mask)
    np.testing.assert_array_equal(out, changed)


def test_the_softmax_is_taken_in_float32():
    """2,000 equal keys: weights of 1/2000 summed in bfloat16 would stick at 1/4 or so of what they come to."""
    keys = 2000
    q, k = jnp.ones((1, 1, 1, D_K), jnp.bfloat16), jnp.ones((1, keys, 1, D_K), jnp.bfloat16)
    out = dot_product_attention(q, k, jnp.ones((1, keys, 1, 1), jnp.bfloat16), jnp.ones((1, 1, keys), bool))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == pytest.approx(1.0, abs=0.01)


def test_float32_is_multiplied_as_float32():
    """An accelerator would otherwise round the operands; on a CPU only the instruction shows it."""
    q, mask = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 2), bool)
    text = jax.jit(dot_product_attention).lower(q, q, q, mask).as_text()
    products = [line for line in text.split("\n") if "dot_general" in line]
    assert len(products) == 2 and all("HIGHEST" in line for line in products)


def test_attention_weights_are_dropped():
    """Values that are a unit matrix make the output the weights themselves."""
    rate = 0.25
    q, k = (jnp.asarray(random(2, 6, H, D_K, seed=i)) for i in range(2))
    v = jnp.broadcast_to(jnp.eye(6)[None, :, None], (2, 6, H, 6))
    mask, key = jnp.ones((2, 6, 6), bool), dropout_key(0, jnp.int32(0), jnp.arange(2))
    weights = dot_product_attention(q, k, v, mask)
    dropped = np.asarray(dot_product_attention(q, k, v, mask, dropout_rate=rate, dropout_key=key, site=4))
    kept = dropped != 0
    np.testing.assert_allclose(dropped, np.where(kept, np.asarray(weights) / (1 - rate), 0), rtol=1e-5)
    assert 0.6 < kept.mean() < 0.9
    other = dot_product_attention(q, k, v, mask, dropout_rate=rate, dropout_key=key, site=5)
    assert np.any((np.asarray(other) != 0) != kept)


def test_multi_head_attention_against_numpy():
    config = ModelConfig(d_model=12, num_heads=H, d_k=D_K, d_v=D_V)
    module = MultiHeadAttention(config, jnp.dtype("float32"))
    x, memory = random(B, T, 12), random(B, S, 12, seed=1)
    mask = np.ones((B, T, S), bool)
    mask[:, :, -3:] = False
    seen = jnp.asarray(mask[:, 0].astype(np.int32))
    sight = Sight.of(Tokens(jnp.ones((B, T), int), jnp.zeros((B, T), int)), Tokens(seen, seen), causal=False)
    parameters = module.init(jax.random.key(0), x, memory, sight, None, 4)["params"]
    parameters = jax.tree.map(lambda box: box.value, parameters, is_leaf=lambda leaf: hasattr(leaf, "names"))
    out = module.apply({"params": parameters}, x, memory, sight, None, 4)
    assert {name: sorted(part) for name, part in parameters.items()} == {
        name: ["kernel"] for name in ("query", "key", "value", "output")
    }
    kernel = {name: np.asarray(part["kernel"], np.float64) for name, part in parameters.items()}
    assert kernel["query"].shape == (12, H, D_K) and kernel["value"].shape == (12, H, D_V)
    heads = [
        reference_attention(
            (x @ kernel["query"][:, h])[:, :, None],
            (memory @ kernel["key"][:, h])[:, :, None],
            (memory @ kernel["value"][:, h])[:, :, None],
            mask,
        )[:, :, 0]
        for h in range(H)
    ]
    concatenated = np.concatenate(heads, axis=-1)
    np.testing.assert_allclose(out, concatenated @ kernel["output"].reshape(H * D_V, 12), atol=1e-5)


@pytest.fixture
def cudnn(monkeypatch):
    """XLA in cuDNN's place, NaN as there for a query that sees no key. Gives the masks that it was called with."""
    plain, masks = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, mask, implementation):
        assert implementation == "cudnn"
        masks.append(np.asarray(mask))
        return jnp.where(jnp.any(mask, -1).swapaxes(1, 2)[..., None], plain(q, k, v, mask=mask), jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return masks


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_takes_the_place_of_the_formula_and_every_query_sees_a_key(cudnn, causal):
    config = ModelConfig(d_model=H * D_K, num_heads=H)
    # Of even lengths, with padding at the end.
    target, source = (
        tokens(np.pad(segments, ((0, 0), (0, 1))))
        for segments in (TARGET_SEGMENTS, TARGET_SEGMENTS if causal else SOURCE_SEGMENTS)
    )
    x_BTD, memory_BSD = (
        jnp.asarray(random(*where.segments_BL.shape, H * D_K), jnp.bfloat16) for where in (target, source)
    )
    module = MultiHeadAttention(config, jnp.dtype(jnp.bfloat16))
    sights = {kernel: Sight.of(target, source, causal=causal, kernel=kernel) for kernel in ("plain", "cudnn")}
    parameters = module.init(jax.random.key(0), x_BTD, memory_BSD, sights["plain"], None, 0)
    sees_BT1 = np.asarray(sights["plain"].mask_BTS.any(-1))[..., None]
    assert causal or not sees_BT1.all()

    def attended(parameters, kernel):
        return module.apply(parameters, x_BTD, memory_BSD, sights[kernel], None, 0).astype(jnp.float32) * sees_BT1

    plain, fused = (np.asarray(attended(parameters, kernel)) for kernel in ("plain", "cudnn"))
    np.testing.assert_allclose(fused, plain, atol=0.02)
    assert len(cudnn) == 1 and cudnn[0].any(-1).all()
    wanted, got = (jax.grad(lambda p, k=kernel: jnp.sum(attended(p, k) ** 2))(parameters) for kernel in sights)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("d_k", "d_v", "length", "dtype"),
    [
        (8, 8, 10, "float32"),
        (4, 4, 10, "bfloat16"),
        (136, 136, 10, "bfloat16"),
        (8, 16, 10, "bfloat16"),
        (8, 8, 9, "bfloat16"),
    ],
)
def test_cudnn_is_not_asked_for_what_it_cannot_do(cudnn, d_k, d_v, length, dtype):
    where = tokens(np.ones((B, length), np.int32))
    sight = Sight.of(where, where, causal=False, kernel="cudnn")
    module = MultiHeadAttention(ModelConfig(d_model=16, num_heads=2, d_k=d_k, d_v=d_v), jnp.dtype(dtype))
    x_BLD = jnp.ones((B, length, 16), dtype)
    jax.eval_shape(lambda: module.init(jax.random.key(0), x_BLD, x_BLD, sight, None, 0))
    assert not cudnn


@pytest.mark.parametrize(("rate", "asked"), [(0.0, {"cudnn"}), (0.1, set())])
def test_a_model_s_kernel_reaches_every_attention_that_drops_no_weights(monkeypatch, rate, asked):
    kernels = []
    monkeypatch.setattr("tfm.model.attention._fused", lambda q, k, v, sight: kernels.append(sight.kernel))
    config = ModelConfig(d_model=16, d_ff=16, num_heads=2, encoder_layers=1, decoder_layers=1)
    config = dataclasses.replace(config, attention_dropout_rate=rate)
    model = Transformer(config, 50, jnp.dtype("bfloat16"), attention="cudnn")
    ids, where = jnp.ones((1, 8), jnp.int32), tokens(np.ones((1, 8), np.int32))
    parameters = jax.eval_shape(lambda: init_parameters(model, 0))
    kernels.clear()
    key = dropout_key(0, jnp.int32(0), jnp.arange(1))
    jax.eval_shape(lambda p: model.apply({"params": p}, ids, where, ids, where, key), parameters)
    assert set(kernels) == asked and len(kernels) % 3 == 0  # self-attention of both stacks, and cross-attention


def test_a_step_of_decoding_takes_its_softmax_in_float32():
    q, k = jnp.ones((1, 1, 1, 8), jnp.bfloat16), jnp.ones((1, 1, 2000, 8), jnp.bfloat16)
    text = jax.jit(attend_once).lower(q, k, k, jnp.ones((1, 2000, 1), bool)).as_text()
    exponentials = [line for line in text.split("\n") if "stablehlo.exponential" in line]
    assert exponentials and not any("bf16" in line for line in exponentials)
