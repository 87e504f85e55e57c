"""What a search asks of logits: the likeliest tokens, the normaliser, and what is left of them for sampling.

A step looks through the vocabulary twice, once for the largest logit of each block of it and once for the sum of
exponentials. On a CPU `top_k` over a whole vocabulary costs ten times as much, `argmax` not much less, and each further
look, were it only to put -inf where a token is banned, a third of the product that made the logits. So logits stay as
they are: of the blocks' maxima, those of the few blocks that hold a banned token are taken once more.

Dimensions: G blocks of X tokens; M blocks that hold something banned; C tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 128
_UNROLLED = 8  # picks that are compiled side by side


class Vocabulary:
    """What may be said: any token but those that are `banned`; the end symbol is nothing that one goes on with.

    Args:
      size: V of the logits.
      eos: id of the end symbol.
      banned: ids with no probability, whatever their logits are.
    """

    def __init__(self, size: int, eos: int, banned: Sequence[int] = ()):
        self.eos = eos
        self._blocks = -(-size // _BLOCK)
        possible_L = np.arange(self._blocks * _BLOCK) < size
        possible_L[list(banned)] = False
        goes_on_L = possible_L.copy()
        goes_on_L[eos] = False
        self.possible_V = possible_L[:size]
        self._possible_GX, self._goes_on_GX = (mask_L.reshape(-1, _BLOCK) for mask_L in (possible_L, goes_on_L))
        self._mixed_M = np.flatnonzero(~self._goes_on_GX.all(axis=1))

    def logits_of(self, logits_BWV: jax.Array, tokens_BW: jax.Array) -> jax.Array:
        """The logits [B, W] of these tokens; -inf of one that is banned."""
        chosen_BW = jnp.take_along_axis(logits_BWV, tokens_BW[..., None], axis=-1)[..., 0]
        return jnp.where(jnp.asarray(self.possible_V)[tokens_BW], chosen_BW, -jnp.inf)

    def masked(self, logits_BWV: jax.Array) -> jax.Array:
        """The logits, with -inf for what is banned."""
        shape = (1,) * (logits_BWV.ndim - 1) + (-1,)
        return jnp.where(jnp.asarray(self.possible_V).reshape(shape), logits_BWV, -jnp.inf)

    def maxima(self, logits_BWV: jax.Array) -> jax.Array:
        """The largest logit [B, W, G] in each block of what one can go on with."""
        blocks_BWGX = _blocks(logits_BWV)
        maxima_BWG = jnp.max(blocks_BWGX, axis=-1)
        left_BWMX = jnp.where(self._goes_on_GX[self._mixed_M], self._mixed(blocks_BWGX), -jnp.inf)
        return maxima_BWG.at[:, :, self._mixed_M].set(jnp.max(left_BWMX, axis=-1))

    def peak(self, logits_BWV: jax.Array, maxima_BWG: jax.Array) -> jax.Array:
        """The largest logit [B, W] of what may be said; not a number if any of them is not."""
        return jnp.maximum(jnp.max(maxima_BWG, axis=-1), self.logits_of_end(logits_BWV))

    def log_normaliser(self, logits_BWV: jax.Array, maxima_BWG: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log sum exp of all that may be said, in two parts [B, W]: the largest logit, and the rest.

        A log-probability near 0 keeps its digits only if the first part is taken from the logit before the second is.
        """
        peak_BW = self.peak(logits_BWV, maxima_BWG)
        # What is banned is left out behind the exponential: in front of it, XLA would hand the sum to a library that
        # takes half as long again on a CPU.
        exps_BWGX = jnp.exp(_blocks(logits_BWV) - peak_BW[..., None, None])
        sums_BWG = jnp.sum(jnp.where(self._possible_GX, exps_BWGX, 0.0), axis=-1)
        return peak_BW, jnp.log(jnp.sum(sums_BWG, axis=-1))

    def _mixed(self, blocks_BWGX: jax.Array) -> jax.Array:
        """The blocks [B, W, M, X] that hold something banned.

        Gathered: slices of a vocabulary that is split over devices can become a permutation, in which all devices of
        the program may have to take part (on CPUs they have), and some have ended their search before others.
        """
        return jnp.take(blocks_BWGX, self._mixed_M, axis=2)

    def logits_of_end(self, logits_BWV: jax.Array) -> jax.Array:
        """The logits [B, W] of the end symbol."""
        return logits_BWV[..., self.eos] if self.possible_V[self.eos] else jnp.full(logits_BWV.shape[:2], -jnp.inf)

    def best_tokens(
        self, logits_BWV: jax.Array, maxima_BWG: jax.Array, base_BW: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The `count` largest of logits + base over all beams of a sentence to go on with; of equals, the first.

        Returns the sums, their beams and their tokens, each [B, count], the largest first. Takes the block that holds
        the largest, that out of the block, and so on: the largest of a block's rest is all that changes.
        """
        batch, beams, blocks = maxima_BWG.shape
        blocks_BGX = _blocks(logits_BWV).reshape(batch, beams * blocks, _BLOCK)
        maxima_BG = (maxima_BWG + base_BW[..., None]).reshape(batch, beams * blocks)
        goes_on_GX = jnp.asarray(self._goes_on_GX)
        ids_1X = jnp.arange(_BLOCK, dtype=jnp.int32)[None]

        def pick(
            index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            maxima_BG, sums_BC, picked_BC = state
            block_B1 = _first(maxima_BG == jnp.max(maxima_BG, axis=1, keepdims=True))
            values_BX = jnp.take_along_axis(blocks_BGX, block_B1[..., None], axis=1)[:, 0]
            values_BX += jnp.take_along_axis(base_BW, block_B1 // blocks, axis=1)
            gone_BX = jnp.any((block_B1 * _BLOCK + ids_1X)[..., None] == picked_BC[:, None], axis=-1)
            values_BX = jnp.where(goes_on_GX[block_B1[:, 0] % blocks] & ~gone_BX, values_BX, -jnp.inf)
            # Taken anew: logits that are computed twice may differ from what `maxima` saw in the last bit.
            sum_B1 = jnp.max(values_BX, axis=1, keepdims=True)
            within_B1 = _first(values_BX == sum_B1)
            rest_B1 = jnp.max(jnp.where(ids_1X == within_B1, -jnp.inf, values_BX), axis=1, keepdims=True)
            maxima_BG = jnp.where(jnp.arange(beams * blocks)[None] == block_B1, rest_B1, maxima_BG)
            return (
                maxima_BG,
                jax.lax.dynamic_update_index_in_dim(sums_BC, sum_B1[:, 0], index, axis=1),
                jax.lax.dynamic_update_index_in_dim(picked_BC, (block_B1 * _BLOCK + within_B1)[:, 0], index, axis=1),
            )

        state = (maxima_BG, jnp.full((batch, count), -jnp.inf), jnp.full((batch, count), -1, jnp.int32))
        _, sums_BC, picked_BC = jax.lax.fori_loop(0, count, pick, state, unroll=count <= _UNROLLED)
        tokens_BC = jnp.minimum(picked_BC % (blocks * _BLOCK), logits_BWV.shape[-1] - 1)
        return sums_BC, picked_BC // (blocks * _BLOCK), tokens_BC


def _blocks(logits_BWV: jax.Array) -> jax.Array:
    """The logits [B, W, G, X] in G blocks, filled up with -inf."""
    short = -logits_BWV.shape[-1] % _BLOCK
    if short:
        logits_BWV = jnp.pad(logits_BWV, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf)
    return logits_BWV.reshape(*logits_BWV.shape[:2], -1, _BLOCK)


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
