"""What a search asks of logits: the likeliest tokens, the normaliser, and what is left of them for sampling.

A step looks through the vocabulary twice, once for the largest logit of each block of it and once for the sum of
exponentials. On a CPU `top_k` over a whole vocabulary costs ten times as much, and `argmax` not much less.

Dimensions: N blocks of X tokens; K tokens that are asked for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 128
_UNROLLED = 8  # picks that are compiled side by side


def _blocks(logits_BWV: jax.Array) -> jax.Array:
    """The logits [B, W, N, X] in N blocks, filled up with -inf."""
    short = -logits_BWV.shape[-1] % _BLOCK
    if short:
        logits_BWV = jnp.pad(logits_BWV, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf)
    return logits_BWV.reshape(*logits_BWV.shape[:2], -1, _BLOCK)


def maxima(logits_BWV: jax.Array, leave_out: int) -> jax.Array:
    """The largest logit [B, W, N] of each block, one token left out."""
    ids_11V = jnp.arange(logits_BWV.shape[-1])[None, None]
    return jnp.max(_blocks(jnp.where(ids_11V == leave_out, -jnp.inf, logits_BWV)), axis=-1)


def log_normaliser(logits_BWV: jax.Array, maxima_BWN: jax.Array, left_out: int) -> tuple[jax.Array, jax.Array]:
    """log sum exp of the logits in two parts [B, W], given what `maxima` found: the largest logit, and the rest.

    A log-probability near 0 keeps its digits only if the first part is taken from the logit before the second is.
    """
    peak_BW = jnp.maximum(jnp.max(maxima_BWN, axis=-1), logits_BWV[..., left_out])
    return peak_BW, jnp.log(jnp.sum(jnp.exp(logits_BWV - peak_BW[..., None]), axis=-1))


def best_tokens(
    logits_BWV: jax.Array, maxima_BWN: jax.Array, base_BW: jax.Array, count: int, leave_out: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` largest of logits + base over all beams of a sentence, one token left out; of equals, the first.

    Returns the sums, their beams and their tokens, each [B, count], the largest first. Takes the block that holds the
    largest, that out of the block, and so on: the largest of a block's rest is all that changes.
    """
    blocks_BWNX = _blocks(logits_BWV)
    batch, beams, blocks, _ = blocks_BWNX.shape
    blocks_BNX = blocks_BWNX.reshape(batch, beams * blocks, _BLOCK)
    maxima_BN = (maxima_BWN + base_BW[..., None]).reshape(batch, beams * blocks)
    ids_1X = jnp.arange(_BLOCK, dtype=jnp.int32)[None]

    def pick(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        maxima_BN, sums_BK, picked_BK = state
        block_B1 = _first(maxima_BN == jnp.max(maxima_BN, axis=1, keepdims=True))
        values_BX = jnp.take_along_axis(blocks_BNX, block_B1[..., None], axis=1)[:, 0]
        values_BX += jnp.take_along_axis(base_BW, block_B1 // blocks, axis=1)
        left_out_BX = (block_B1 % blocks) * _BLOCK + ids_1X == leave_out
        gone_BX = jnp.any((block_B1 * _BLOCK + ids_1X)[..., None] == picked_BK[:, None], axis=-1)
        values_BX = jnp.where(left_out_BX | gone_BX, -jnp.inf, values_BX)
        # Taken anew: logits that are computed twice may differ from what `maxima` saw in the last bit.
        sum_B1 = jnp.max(values_BX, axis=1, keepdims=True)
        within_B1 = _first(values_BX == sum_B1)
        rest_B1 = jnp.max(jnp.where(ids_1X == within_B1, -jnp.inf, values_BX), axis=1, keepdims=True)
        maxima_BN = jnp.where(jnp.arange(beams * blocks)[None] == block_B1, rest_B1, maxima_BN)
        return (
            maxima_BN,
            jax.lax.dynamic_update_index_in_dim(sums_BK, sum_B1[:, 0], index, axis=1),
            jax.lax.dynamic_update_index_in_dim(picked_BK, (block_B1 * _BLOCK + within_B1)[:, 0], index, axis=1),
        )

    state = (maxima_BN, jnp.full((batch, count), -jnp.inf), jnp.full((batch, count), -1, jnp.int32))
    _, sums_BK, picked_BK = jax.lax.fori_loop(0, count, pick, state, unroll=count <= _UNROLLED)
    return sums_BK, picked_BK // (blocks * _BLOCK), jnp.minimum(picked_BK % (blocks * _BLOCK), logits_BWV.shape[-1] - 1)


def _first(is_it_BL: jax.Array) -> jax.Array:
    """Where each row is true first [B, 1]; its last place where it never is, as among what is not a number."""
    places_1L = jnp.arange(is_it_BL.shape[1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(is_it_BL, places_1L, is_it_BL.shape[1] - 1), axis=1, keepdims=True)


def truncated(logits_BWV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits with -inf for what is beyond the likeliest `top_k` tokens, or beyond a probability of `top_p` together."""
    if top_k:
        least_BW1 = jax.lax.top_k(logits_BWV, min(top_k, logits_BWV.shape[-1]))[0][..., -1:]
        logits_BWV = jnp.where(logits_BWV < least_BW1, -jnp.inf, logits_BWV)
    if top_p < 1:
        sorted_BWV = -jnp.sort(-logits_BWV, axis=-1)
        probs_BWV = jax.nn.softmax(sorted_BWV, axis=-1)
        inside_BWV = jnp.cumsum(probs_BWV, axis=-1) - probs_BWV < top_p
        least_BW1 = jnp.min(jnp.where(inside_BWV, sorted_BWV, jnp.inf), axis=-1, keepdims=True)
        logits_BWV = jnp.where(logits_BWV < least_BW1, -jnp.inf, logits_BWV)
    return logits_BWV
