"""Label-smoothed cross-entropy, as sums and counts, without the logits of a whole batch ever standing in memory.

The mean is taken once, over all target tokens of the global batch, so that it depends neither on the devices nor on the
micro-batches that a batch is computed in.

The output projection belongs to the loss here. Its logits are the largest array of a training step by far, and all that
is wanted of them is a number and a gradient; so they are made a few positions at a time, and the gradient is taken
while they are still in the cache. The loss being a sum, the gradient of each chunk is final but for one factor.

Dimension C here: the target positions of one chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tfm.model.attention import MASKED
from tfm.model.projection import matmul_precision
from tfm.sharding import constrain


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars."""

    loss: jax.Array  # label-smoothed cross-entropy, nats
    nll: jax.Array  # negative log-likelihood without smoothing, nats; to be looked at: it has no gradient
    tokens: jax.Array  # number of target tokens


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float,
    vocab_size: int,
    chunks: int = 1,
) -> LossSums:
    """Cross-entropy with (1 - ε) on the target and ε spread evenly over the vocabulary (Szegedy et al., 2016).

    Args:
      x_BTD: output of the decoder, in the dtype that matrix products are to have.
      table_VD: float32 output embedding; rows from `vocab_size` on pad the table and have no probability.
      targets_BT: int32 token ids.
      weights_BT: 1 for a target token, 0 for padding.
      label_smoothing: ε.
      vocab_size: number of real ids.
      chunks: pieces along T, a divisor of it, that the logits are made in.
    """
    return _sums(x_BTD, table_VD, targets_BT, weights_BT, label_smoothing, vocab_size, chunks, with_gradient=False)[0]


def _sums(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float,
    vocab_size: int,
    chunks: int,
    *,
    with_gradient: bool,
) -> tuple[LossSums, tuple[jax.Array, jax.Array] | None]:
    """The sums, and the gradient of `loss` with respect to x [B, T, D] and the table [V, D]."""
    dtype, precision = x_BTD.dtype, matmul_precision(x_BTD.dtype)
    table = constrain(table_VD.astype(dtype), "vocab", None)
    ids_11V = jnp.arange(table.shape[0])[None, None]
    is_real_11V = ids_11V < vocab_size

    def chunk(total: tuple[LossSums, jax.Array | None], piece: tuple[jax.Array, ...]) -> tuple:
        sums, table_gradient_VD = total
        x_BCD, targets_BC, weights_BC = piece
        # For a gradient, logits lie in memory in the dtype of the products; all sums of them are float32 in any case.
        kept_as = dtype if with_gradient else jnp.float32
        logits_BCV = jnp.einsum("BCD,VD->BCV", x_BCD, table, precision=precision, preferred_element_type=kept_as)
        logits_BCV = constrain(logits_BCV, "activation_batch", "activation_length", "activation_vocab")
        logits_BCV = logits_BCV.astype(jnp.float32)
        logits_BCV = jnp.where(is_real_11V, logits_BCV, MASKED)
        is_target_BCV = ids_11V == targets_BC[..., None]
        # One pass each: maximum, then everything that sums over the vocabulary.
        max_BC = jnp.max(logits_BCV, axis=-1)
        exp_BCV = jnp.exp(logits_BCV - max_BC[..., None])
        normaliser_BC = jnp.sum(exp_BCV, axis=-1)
        target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
        mean_BC = jnp.sum(jnp.where(is_real_11V, logits_BCV, 0.0), axis=-1) / vocab_size
        lse_BC = max_BC + jnp.log(normaliser_BC)
        nll_BC = lse_BC - target_BC
        loss_BC = (1.0 - label_smoothing) * nll_BC + label_smoothing * (lse_BC - mean_BC)
        sums = LossSums(
            sums.loss + jnp.sum(loss_BC * weights_BC),
            sums.nll + jnp.sum(nll_BC * weights_BC),
            sums.tokens + jnp.sum(weights_BC),
        )
        if not with_gradient:
            return (sums, None), None
        # d loss / d logits = softmax - smoothed target, at the weight of the token.
        scale_BC = weights_BC / normaliser_BC
        wanted_BCV = jnp.where(is_target_BCV, 1.0 - label_smoothing, 0.0) + label_smoothing / vocab_size
        gradient_BCV = exp_BCV * scale_BC[..., None] - wanted_BCV * weights_BC[..., None]
        gradient_BCV = jnp.where(is_real_11V, gradient_BCV, 0.0).astype(dtype)
        table_gradient_VD += jnp.einsum(
            "BCV,BCD->VD", gradient_BCV, x_BCD, precision=precision, preferred_element_type=jnp.float32
        )
        return (sums, table_gradient_VD), jnp.einsum("BCV,VD->BCD", gradient_BCV, table, precision=precision)

    pieces = jax.tree.map(lambda a: _cut(a, chunks), (x_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    zero = jnp.zeros((), jnp.float32)
    start = (LossSums(zero, zero, zero), jnp.zeros_like(table_VD) if with_gradient else None)
    if chunks == 1:
        (sums, table_gradient_VD), x_gradient = chunk(start, jax.tree.map(lambda a: a[0], pieces))
        return sums, (x_gradient, table_gradient_VD) if with_gradient else None
    (sums, table_gradient_VD), x_gradients = jax.lax.scan(chunk, start, pieces)
    if not with_gradient:
        return sums, None
    return sums, (jnp.moveaxis(x_gradients, 0, 1).reshape(x_BTD.shape), table_gradient_VD)


def _cut(a: jax.Array, chunks: int) -> jax.Array:
    """[B, T, …] -> [chunks, B, T / chunks, …]: along T, so that each device keeps the rows it has."""
    return jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0)


def _forward(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float,
    vocab_size: int,
    chunks: int,
) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    return _sums(x_BTD, table_VD, targets_BT, weights_BT, label_smoothing, vocab_size, chunks, with_gradient=True)


def _backward(
    label_smoothing: float,
    vocab_size: int,
    chunks: int,
    gradients: tuple[jax.Array, jax.Array],
    cotangents: LossSums,
) -> tuple[jax.Array, jax.Array, None, None]:
    x_BTD, table_VD = gradients
    return x_BTD * cotangents.loss.astype(x_BTD.dtype), table_VD * cotangents.loss, None, None


cross_entropy.defvjp(_forward, _backward)


def chunks_for(rows: int, length: int, padded_vocab: int, logits_per_chunk: int) -> int:
    """Fewest pieces of a row's length, a divisor of it, that keep a device's logits to `logits_per_chunk` at once."""
    for pieces in range(1, length):
        if length % pieces == 0 and rows * (length // pieces) * padded_vocab <= logits_per_chunk:
            return pieces
    return length
