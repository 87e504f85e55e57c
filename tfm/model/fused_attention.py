"""Attention over whole rows as one kernel for TPUs, which never writes scores or weights to memory.

Rows of translation are short: all scores of a row fit on the chip. So there is no running softmax as in kernels for
long sequences, whose bookkeeping would be as large as the scores here; the backward pass computes the weights again
from queries and keys, and keeps nothing else.

Matrix units are 128 wide and heads often 64: heads lie side by side in blocks of 128 features, a program takes one
block, and for each head in it sets the features of the others to zero, which costs such a unit nothing.

Dimension P: features of all heads, and within a kernel those of a block of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tfm.model.attention import MASKED
from tfm.sharding import heads_on_a_device, per_device_and_head

_LANES = 128
_LONGEST = 512  # tokens of a row: scores and weights of one head, in float32, have to fit on the chip several times


def fits(q_BTP: jax.Array, k_BSP: jax.Array, v_BSP: jax.Array, width: int) -> bool:
    """Can the kernel take these, with heads of that width?"""
    lengths, heads = (q_BTP.shape[1], k_BSP.shape[1]), heads_on_a_device(q_BTP.shape[2] // width)
    return (
        q_BTP.dtype == jnp.bfloat16
        and v_BSP.shape[2] == q_BTP.shape[2]
        and (width % _LANES == 0 or (_LANES % width == 0 and heads * width % _LANES == 0))
        and all(length % _LANES == 0 and length <= _LONGEST for length in lengths)
    )


def fused_attention(
    q_BTP: jax.Array,
    k_BSP: jax.Array,
    v_BSP: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    *,
    width: int,
    causal: bool,
) -> jax.Array:
    """softmax(Q Kᵀ / √d_k) V within segments, [B, T, P]; `causal` goes by the place in the row.

    Within a mesh, each device takes its own rows and heads.

    Args:
      q_BTP, k_BSP, v_BSP: heads of `width` features side by side.
      query_segments_BT, key_segments_BS: int32, the pair of a row that a token belongs to.
      width: features of a head.
      causal: does a query see no key that stands behind it?
    """
    attend = partial(_attention, _Kind(width, causal))
    return per_device_and_head(attend, (q_BTP, k_BSP, v_BSP), (query_segments_BT, key_segments_BS))


class _Kind(NamedTuple):
    width: int  # features of a head
    causal: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kind: _Kind, qkv: tuple[jax.Array, ...], segments: tuple[jax.Array, ...]) -> jax.Array:
    return _call(_forward_kernel, kind, qkv, segments, products=2)[0]


def _forward(kind: _Kind, qkv: tuple[jax.Array, ...], segments: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
    return _attention(kind, qkv, segments), (qkv, segments)


def _backward(kind: _Kind, kept: Any, gradient_BTP: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    qkv, segments = kept
    return tuple(_call(_backward_kernel, kind, (*qkv, gradient_BTP), segments, products=5)), None


_attention.defvjp(_forward, _backward)


def _call(
    kernel: Any, kind: _Kind, inputs: tuple[jax.Array, ...], segments: tuple[jax.Array, ...], *, products: int
) -> list[jax.Array]:
    """Runs a kernel over rows and blocks of heads.

    The forward kernel gives the output, the backward one the gradients of queries, keys and values.
    """
    q_BTP, k_BSP = inputs[:2]
    (batch, queries, features), keys = q_BTP.shape, k_BSP.shape[1]
    block = max(kind.width, _LANES)
    results = [q_BTP] if kernel is _forward_kernel else list(inputs[:3])

    def of_block(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, x.shape[1], block), lambda row, at: (row, 0, at))

    def of_row(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, x.shape[1]), lambda row, at: (row, 0, 0))

    scores = batch * features // kind.width * queries * keys
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *segments, *results))
    return pl.pallas_call(
        partial(kernel, **kind._asdict()),
        grid=(batch, features // block),
        in_specs=[*map(of_block, inputs), *map(of_row, segments)],
        out_specs=[*map(of_block, results)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * kind.width, transcendentals=scores, bytes_accessed=moved
        ),
    )(*inputs, *(x[:, None] for x in segments))


def _forward_kernel(q_ref, k_ref, v_ref, query_segments_ref, key_segments_ref, out_ref, *, width, causal):
    q_TP, k_SP, v_SP = q_ref[...], k_ref[...], v_ref[...]
    seen_TS = _seen(query_segments_ref, key_segments_ref, causal)
    out_TP = jnp.zeros(q_TP.shape, jnp.float32)
    for head in range(q_TP.shape[1] // width):
        weights_TS = _weights(_only(q_TP, head, width), k_SP, seen_TS, width).astype(v_SP.dtype)
        out_TP += _of_head(_product(weights_TS, v_SP, 1, 0), head, width)
    out_ref[...] = out_TP.astype(out_ref.dtype)


def _backward_kernel(
    q_ref, k_ref, v_ref, gradient_ref, query_segments_ref, key_segments_ref, dq_ref, dk_ref, dv_ref, *, width, causal
):
    q_TP, k_SP, v_SP, gradient_TP = q_ref[...], k_ref[...], v_ref[...], gradient_ref[...]
    seen_TS = _seen(query_segments_ref, key_segments_ref, causal)
    dq_TP = jnp.zeros(q_TP.shape, jnp.float32)
    dk_SP, dv_SP = (jnp.zeros(k_SP.shape, jnp.float32) for _ in range(2))
    for head in range(q_TP.shape[1] // width):
        weights_TS = _weights(_only(q_TP, head, width), k_SP, seen_TS, width)
        dv_SP += _of_head(_product(weights_TS.astype(v_SP.dtype), gradient_TP, 0, 0), head, width)
        dweights_TS = _product(_only(gradient_TP, head, width), v_SP, 1, 1)
        mean_T1 = jnp.sum(weights_TS * dweights_TS, axis=1, keepdims=True)
        dscores_TS = jnp.where(seen_TS, weights_TS * (dweights_TS - mean_T1), 0.0) / math.sqrt(width)
        dscores_TS = dscores_TS.astype(q_TP.dtype)
        dq_TP += _of_head(_product(dscores_TS, k_SP, 1, 0), head, width)
        dk_SP += _of_head(_product(dscores_TS, q_TP, 0, 0), head, width)
    dq_ref[...] = dq_TP.astype(dq_ref.dtype)
    dk_ref[...] = dk_SP.astype(dk_ref.dtype)
    dv_ref[...] = dv_SP.astype(dv_ref.dtype)


def _seen(query_segments_ref: Any, key_segments_ref: Any, causal: bool) -> jax.Array:
    """Bool [T, S]: does the query see the key?"""
    shape_TS = (query_segments_ref.shape[1], key_segments_ref.shape[1])
    queries_TS = jnp.broadcast_to(query_segments_ref[...], shape_TS[::-1]).T
    seen_TS = queries_TS == jnp.broadcast_to(key_segments_ref[...], shape_TS)
    if causal:
        rows_TS, columns_TS = (jax.lax.broadcasted_iota(jnp.int32, shape_TS, axis) for axis in (0, 1))
        seen_TS &= rows_TS >= columns_TS
    return seen_TS


def _weights(q_TP: jax.Array, k_SP: jax.Array, seen_TS: jax.Array, width: int) -> jax.Array:
    """Attention weights [T, S] of one head, float32."""
    scores_TS = jnp.where(seen_TS, _product(q_TP, k_SP, 1, 1) / math.sqrt(width), MASKED)
    exp_TS = jnp.exp(scores_TS - jnp.max(scores_TS, axis=1, keepdims=True))
    return exp_TS / jnp.sum(exp_TS, axis=1, keepdims=True)


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Sums over one axis of each, in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _only(x_LP: jax.Array, head: int, width: int) -> jax.Array:
    """Zeros in place of the features of other heads."""
    return _of_head(x_LP.astype(jnp.float32), head, width).astype(x_LP.dtype)


def _of_head(x_LP: jax.Array, head: int, width: int) -> jax.Array:
    if x_LP.shape[1] == width:
        return x_LP
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x_LP.shape, 1) // width == head, x_LP, 0.0)
