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

from tfm.model.projection import matmul_precision
from tfm.sharding import constrain


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars."""

    loss: jax.Array  # label-smoothed cross-entropy, nats
    nll: jax.Array  # negative log-likelihood without smoothing, nats; to be looked at: it has no gradient
    tokens: jax.Array  # number of target tokens


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float,
    vocab_size: int,
    chunks: int = 1,
    shards: int = 1,
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
      shards: devices, or groups of them, that the rows lie on, a divisor of B.
    """
    rest = (targets_BT, weights_BT, label_smoothing, vocab_size, chunks, shards)
    return _sums(x_BTD, table_VD, *rest, with_gradient=False)[0]


def _sums(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float,
    vocab_size: int,
    chunks: int,
    shards: int,
    *,
    with_gradient: bool,
) -> tuple[LossSums, tuple[jax.Array, jax.Array] | None]:
    """The sums, and the gradient of `loss` with respect to x [B, T, D] and the table [V, D]."""
    dtype, precision = x_BTD.dtype, matmul_precision(x_BTD.dtype)
    is_real_V = jnp.arange(table_VD.shape[0]) < vocab_size
    is_real_11V = is_real_V[None, None]
    # Devices add up what each has found of the table's gradient once, after all pieces. Of one piece, it is left to the
    # compiler: it adds the embeddings' share first, and with fsdp leaves each device its own part.
    shards = 1 if chunks == 1 else shards
    table_VD = constrain(table_VD, "vocab", None)  # as the embeddings have it: with fsdp, it is gathered once for all
    # What pads the table repeats its first row: the largest logit is then a real one, with no pass to mask the others.
    table = jnp.where(is_real_V[:, None], table_VD, table_VD[:1]).astype(dtype)
    # The mean of the logits is the product with the mean row; of the table as it came, in the pass that rounds it.
    mean_row_D = jnp.sum(jnp.where(is_real_V[:, None], table_VD, 0), axis=0, dtype=jnp.float32) / vocab_size
    mean_BT = jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), mean_row_D, precision=jax.lax.Precision.HIGHEST)

    def chunk(table_gradient_NDV: jax.Array | None, piece: tuple[jax.Array, ...]) -> tuple:
        x_BCD, targets_BC, weights_BC = piece
        # For a gradient, logits lie in memory in the dtype of the products; all sums of them are float32 in any case.
        kept_as = dtype if with_gradient else jnp.float32
        logits_BCV = jnp.einsum("BCD,VD->BCV", x_BCD, table, precision=precision, preferred_element_type=kept_as)
        logits_BCV = constrain(logits_BCV, "activation_batch", "activation_length", "activation_vocab")
        logits_BCV = logits_BCV.astype(jnp.float32)
        max_BC = jnp.max(logits_BCV, axis=-1)
        exp_BCV = jnp.where(is_real_11V, jnp.exp(logits_BCV - max_BC[..., None]), 0.0)
        normaliser_BC = jnp.sum(exp_BCV, axis=-1)
        lse_BC = max_BC + jnp.log(normaliser_BC)
        found = lse_BC, _of_targets(logits_BCV, targets_BC)
        if not with_gradient:
            return None, found
        # d loss / d logits = softmax - smoothed target, at the weight of the token.
        scale_BC = weights_BC / normaliser_BC
        wanted_BCV = jnp.where(_are_targets(logits_BCV, targets_BC), 1.0 - label_smoothing, 0.0)
        wanted_BCV += jnp.where(is_real_11V, label_smoothing / vocab_size, 0.0)
        gradient_BCV = (exp_BCV * scale_BC[..., None] - wanted_BCV * weights_BC[..., None]).astype(dtype)
        # Lying on its side, for CPUs, to which [V, D] would mean a transposed copy of the gradient.
        by_shard = (a.reshape(shards, -1, *a.shape[1:]) for a in (x_BCD, gradient_BCV))
        table_gradient_NDV += jnp.einsum(
            "NRCD,NRCV->NDV", *by_shard, precision=precision, preferred_element_type=jnp.float32
        )
        if shards > 1:
            table_gradient_NDV = constrain(table_gradient_NDV, "activation_batch", None, "activation_vocab")
        return table_gradient_NDV, (*found, jnp.einsum("BCV,VD->BCD", gradient_BCV, table, precision=precision))

    table_gradient_NDV = jnp.zeros((shards, *table.shape[::-1]), jnp.float32) if with_gradient else None
    weights_BT = weights_BT.astype(jnp.float32)
    pieces = jax.tree.map(lambda a: _cut(a, chunks), (x_BTD, targets_BT, weights_BT))
    if chunks == 1:
        table_gradient_NDV, found = chunk(table_gradient_NDV, jax.tree.map(lambda a: a[0], pieces))
    else:
        table_gradient_NDV, found = jax.lax.scan(chunk, table_gradient_NDV, pieces)
        found = jax.tree.map(_joined, found)
    lse_BT, target_BT, *gradients = found
    nll_BT = lse_BT - target_BT
    loss_BT = (1.0 - label_smoothing) * nll_BT + label_smoothing * (lse_BT - mean_BT)
    sums = LossSums(jnp.sum(loss_BT * weights_BT), jnp.sum(nll_BT * weights_BT), jnp.sum(weights_BT))
    return sums, (*gradients, _upright(table_gradient_NDV, dtype)) if with_gradient else None


def _upright(table_gradient_NDV: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[N, D, V] -> [V, D], over all N, of products of `dtype`."""

    def apart(table_gradient_NDV: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(jnp.sum(table_gradient_NDV, axis=0)).T

    def plain(table_gradient_NDV: jax.Array) -> jax.Array:
        return jnp.sum(table_gradient_NDV, axis=0).T

    # XLA takes the transposition into the product, of which CPUs have none with a float32 result of other operands.
    return jax.lax.platform_dependent(table_gradient_NDV, cpu=plain if dtype == jnp.float32 else apart, default=plain)


def _of_targets(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """The logit of each target [B, C]."""

    def looked_up(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]

    def summed(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(_are_targets(logits_BCV, targets_BC), logits_BCV, 0.0), axis=-1)

    # Accelerators sum in a pass that they make anyway; to CPUs, it would be one more.
    return jax.lax.platform_dependent(logits_BCV, targets_BC, cpu=looked_up, default=summed)


def _are_targets(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jnp.arange(logits_BCV.shape[-1])[None, None] == targets_BC[..., None]


def _cut(a: jax.Array, chunks: int) -> jax.Array:
    """[B, T, …] -> [chunks, B, T / chunks, …]: along T, so that each device keeps the rows it has."""
    return jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0)


def _joined(a: jax.Array) -> jax.Array:
    """[chunks, B, C, …] -> [B, chunks * C, …]: what was cut."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])


def _forward(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float,
    vocab_size: int,
    chunks: int,
    shards: int,
) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    rest = (targets_BT, weights_BT, label_smoothing, vocab_size, chunks, shards)
    return _sums(x_BTD, table_VD, *rest, with_gradient=True)


def _backward(
    label_smoothing: float,
    vocab_size: int,
    chunks: int,
    shards: int,
    gradients: tuple[jax.Array, jax.Array],
    cotangents: LossSums,
) -> tuple[jax.Array, jax.Array, None, None]:
    x_BTD, table_VD = gradients
    return x_BTD * cotangents.loss.astype(x_BTD.dtype), table_VD * cotangents.loss, None, None


cross_entropy.defvjp(_forward, _backward)


def chunks_for(rows: int, length: int, vocabulary: int, logits_per_chunk: int) -> int:
    """Fewest pieces of a row's length, a divisor of it, that keep a device's logits to `logits_per_chunk` at once.

    `rows` and `vocabulary` are what one device has of them.
    """
    for pieces in range(1, length):
        if length % pieces == 0 and rows * (length // pieces) * vocabulary <= logits_per_chunk:
            return pieces
    return length
