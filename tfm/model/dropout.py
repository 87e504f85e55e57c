"""Dropout whose bits are an elementwise function of a counter.

A bit depends on (seed, step, layer, site, row of the global batch, position, feature) and on nothing else, so a mask is
the same on every mesh, number of hosts and split into micro-batches. A generator with a state, or XLA's own, would
have each device draw the mask of the whole global batch.

The mixing function is a 32-bit multiply-xorshift hash whose constants were found by search for low bias (Wellons,
"hash-prospector", 2018); its uniformity and independence across sites are tested.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each input bit flips each output bit half of the time."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


class DropoutKey(NamedTuple):
    """What the bits of one step depend on beside layer, site, position and feature."""

    key: jax.Array  # uint32 []
    rows_B: jax.Array  # int32, row numbers within the global batch

    def fold_in(self, number: int | jax.Array) -> DropoutKey:
        """The key of one layer, or of one site within it."""
        return self._replace(key=mix(self.key ^ mix(jnp.asarray(number).astype(jnp.uint32) + _GOLDEN)))


def dropout_key(seed: int, step: jax.Array, rows_B: jax.Array) -> DropoutKey:
    """Key of a training step; `step` is an int32 scalar."""
    # Mixed once more than the step is: otherwise seed 2 at step 5 would have the bits of seed 5 at step 2.
    return DropoutKey(mix(mix(jnp.uint32(seed & 0xFFFFFFFF) ^ _GOLDEN)), rows_B).fold_in(step)


def keep_mask(key: DropoutKey, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Bool [B, L, …]: True where an element is kept, with probability 1 - rate. Dimension 0 is the key's rows."""
    rows = mix(key.key ^ mix(key.rows_B.astype(jnp.uint32) + _GOLDEN))
    bits = rows
    for size in (shape[1], int(np.prod(shape[2:]))):
        counter = mix(jnp.arange(size, dtype=jnp.uint32) * _GOLDEN + np.uint32(1))
        bits = mix(jnp.expand_dims(bits, -1) ^ counter.reshape((1,) * bits.ndim + (size,)))
    return (bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))).reshape(shape)


def dropout(x: jax.Array, rate: float, key: DropoutKey | None, site: int) -> jax.Array:
    """`x` [B, L, …] with a share `rate` of its elements zeroed and the rest scaled up; without a key, `x` itself."""
    if key is None or rate == 0.0:
        return x
    site_key = key.fold_in(site)

    def drop(x: jax.Array) -> jax.Array:
        return jnp.where(keep_mask(site_key, x.shape, rate), x / (1.0 - rate), jnp.zeros_like(x))

    # On accelerators, the bits are computed again in the backward pass, which takes less than to keep them. On CPUs,
    # whose products are float32, it would take longer.
    return drop(x) if x.dtype == jnp.float32 else jax.checkpoint(drop, prevent_cse=False)(x)
