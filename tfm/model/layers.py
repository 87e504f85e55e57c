"""The feed-forward block, embedding and positions, and the encoder and decoder layers (sections 3.1, 3.3 to 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tfm.config import ModelConfig
from tfm.model.attention import LayerCache, MultiHeadAttention, Sight
from tfm.model.dropout import DropoutKey, dropout
from tfm.model.projection import Projection, matmul_precision
from tfm.sharding import constrain

# Where in a layer dropout is applied; each site draws bits of its own.
_SITES = {
    name: i
    for i, name in enumerate(("input", "self", "cross", "mlp", "self_weights", "cross_weights", "inner", "token"))
}

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu}

VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding table: a multiple of 128, which fills matrix units and divides over usual `mesh.tensor`."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def sinusoids(positions_BL: jax.Array, d_model: int) -> jax.Array:
    """Position encodings [B, L, D], float32: sines at even features, cosines at odd ones (section 3.5)."""
    frequencies = jnp.exp(jnp.arange(0, d_model, 2, dtype=jnp.float32) * (-math.log(10_000.0) / d_model))
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies.reshape((1,) * positions_BL.ndim + (-1,))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions_BL.shape, d_model)


class Embedding(nn.Module):
    """A table of token vectors, used for input, for output, or for both (section 3.4)."""

    config: ModelConfig
    vocab_size: int
    dtype: jnp.dtype

    def setup(self) -> None:
        d_model = self.config.d_model
        initializer = nn.with_logical_partitioning(nn.initializers.normal(d_model**-0.5), ("vocab", "embed"))
        self.table_VD = self.param("table", initializer, (padded_vocab_size(self.vocab_size), d_model), jnp.float32)

    def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array, key: DropoutKey | None) -> jax.Array:
        """[B, L, D]: token vectors times √d_model, plus position encodings, with dropout.

        `token_dropout_rate` leaves out whole vectors: the model has to do without a word (Gal & Ghahramani, 2016).
        Positions may be [1, L], where they are the same in each row: their sines are then computed once.
        """
        # Whole in width before rows are looked up: a batch and a width on the same mesh axis could not be told apart.
        table_VD = constrain(self.table_VD, "vocab", None)
        c, x_BLD = self.config, table_VD[tokens_BL] * math.sqrt(self.config.d_model)
        if c.token_dropout_rate and key is not None:
            kept_BL1 = dropout(jnp.ones((*tokens_BL.shape, 1)), c.token_dropout_rate, key, _SITES["token"])
            x_BLD = x_BLD * kept_BL1
        x_BLD = (x_BLD + sinusoids(positions_BL, c.d_model)).astype(self.dtype)
        x_BLD = dropout(x_BLD, c.dropout_rate, key, _SITES["input"])
        return constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32, V the padded size: the loss and the search leave out ids beyond the vocabulary."""
        logits_BTV = jnp.einsum(
            "BTD,VD->BTV",
            x_BTD.astype(self.dtype),
            self.table_VD.astype(self.dtype),
            precision=matmul_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits_BTV, "activation_batch", "activation_length", "activation_vocab")


def _computed_again(block: Any, dtype: jnp.dtype) -> Any:
    """A module's class, or a function of a module, that keeps its input alone for the backward pass.

    What it computes on the way, masks and float32, is as large again as all that is kept, and moves more bytes than
    computing it again does. On CPUs, where products are float32, it is kept: computing it takes longer there.
    """
    return block if dtype == jnp.float32 else nn.remat(block, prevent_cse=False)


class LayerNorm(nn.Module):
    """Layer normalisation over features, in float32 (Ba et al., 2016)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        norm = _computed_again(nn.LayerNorm, self.dtype)(
            epsilon=1e-6,
            dtype=jnp.float32,
            scale_init=nn.with_logical_partitioning(ones, ("embed",)),
            bias_init=nn.with_logical_partitioning(zeros, ("embed",)),
            name="norm",
        )
        return norm(x_BLD).astype(self.dtype)


class FeedForward(nn.Module):
    """max(0, x W1 + b1) W2 + b2 (equation 2), or with another activation."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: jax.Array, key: DropoutKey | None) -> jax.Array:
        c = self.config
        x_BLF = Projection((c.d_model,), (c.d_ff,), ("embed", "mlp"), self.dtype, use_bias=True, name="inner")(x_BLD)
        x_BLF = constrain(x_BLF, "activation_batch", "activation_length", "activation_mlp")

        def rest(module: FeedForward, x_BLF: jax.Array) -> jax.Array:
            x_BLF = dropout(_ACTIVATIONS[c.activation](x_BLF), c.activation_dropout_rate, key, _SITES["inner"])
            axes = ("mlp", "embed")
            return Projection((c.d_ff,), (c.d_model,), axes, module.dtype, use_bias=True, name="outer")(x_BLF)

        return _computed_again(rest, self.dtype)(self, x_BLF)


class _Layer(nn.Module):
    """What encoder and decoder layers share: a residual sum around each block, normed after or before (section 3.1)."""

    config: ModelConfig
    dtype: jnp.dtype

    def residual(
        self, x: jax.Array, norm: LayerNorm, block: Callable[[jax.Array], jax.Array], key: DropoutKey | None, site: str
    ) -> jax.Array:
        """LayerNorm(x + Dropout(Block(x))), or x + Dropout(Block(LayerNorm(x))) with `norm="pre"`."""
        pre = self.config.norm == "pre"
        y = dropout(block(norm(x) if pre else x), self.config.dropout_rate, key, _SITES[site])
        y = constrain(x + y, "activation_batch", "activation_length", "activation_embed")
        return y if pre else norm(y)


class EncoderLayer(_Layer):
    """Self-attention and the feed-forward block: [B, S, D] to [B, S, D]. Without a `key` there is no dropout."""

    def setup(self) -> None:
        self.self_attention = MultiHeadAttention(self.config, self.dtype)
        self.self_norm = LayerNorm(self.dtype)
        self.feed_forward = FeedForward(self.config, self.dtype)
        self.feed_forward_norm = LayerNorm(self.dtype)

    def __call__(self, x_BSD: jax.Array, sight: Sight, key: DropoutKey | None) -> jax.Array:
        def attend(x: jax.Array) -> jax.Array:
            return self.self_attention(x, x, sight, key, _SITES["self_weights"])

        x_BSD = self.residual(x_BSD, self.self_norm, attend, key, "self")
        return self.residual(x_BSD, self.feed_forward_norm, lambda x: self.feed_forward(x, key), key, "mlp")


class DecoderLayer(_Layer):
    """Self-attention, attention to the memory [B, S, D] and the feed-forward block: [B, T, D] to [B, T, D]."""

    def setup(self) -> None:
        self.self_attention = MultiHeadAttention(self.config, self.dtype)
        self.self_norm = LayerNorm(self.dtype)
        self.cross_attention = MultiHeadAttention(self.config, self.dtype)
        self.cross_norm = LayerNorm(self.dtype)
        self.feed_forward = FeedForward(self.config, self.dtype)
        self.feed_forward_norm = LayerNorm(self.dtype)

    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BSD: jax.Array,
        self_sight: Sight,
        cross_sight: Sight,
        key: DropoutKey | None,
    ) -> jax.Array:
        def attend(x: jax.Array) -> jax.Array:
            return self.self_attention(x, x, self_sight, key, _SITES["self_weights"])

        def look(x: jax.Array) -> jax.Array:
            return self.cross_attention(x, memory_BSD, cross_sight, key, _SITES["cross_weights"])

        x_BTD = self.residual(x_BTD, self.self_norm, attend, key, "self")
        x_BTD = self.residual(x_BTD, self.cross_norm, look, key, "cross")
        return self.residual(x_BTD, self.feed_forward_norm, lambda x: self.feed_forward(x, key), key, "mlp")

    def new_cache(self, memory_BSD: jax.Array, beams: int, length: int) -> LayerCache:
        """An empty cache for `length` positions of `beams` hypotheses a sentence; cross-attention's part is final."""
        c, slots = self.config, (memory_BSD.shape[0], self.config.num_heads, length * beams)
        axes = ("activation_batch", "activation_heads", "activation_length", "activation_kv")
        return LayerCache(
            constrain(jnp.zeros((*slots, c.key_width), self.dtype), *axes),
            constrain(jnp.zeros((*slots, c.value_width), self.dtype), *axes),
            *(kv.swapaxes(1, 2) for kv in self.cross_attention.keys_and_values(memory_BSD)),
        )

    def decode_step(
        self,
        x_BWD: jax.Array,
        cache: LayerCache,
        seen_BLW: jax.Array,
        source_mask_BS: jax.Array,
        slot: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """The layer at one target position of each beam, the first of which writes into `slot`."""
        written: list[jax.Array] = []

        def attend(x: jax.Array) -> jax.Array:
            out, *keys_and_values = self.self_attention.decode_self(
                x, cache.self_keys_BHLK, cache.self_values_BHLK, seen_BLW, slot
            )
            written.extend(keys_and_values)
            return out

        def look(x: jax.Array) -> jax.Array:
            return self.cross_attention.decode_cross(x, cache.cross_keys_BHSK, cache.cross_values_BHSK, source_mask_BS)

        x_BWD = self.residual(x_BWD, self.self_norm, attend, None, "self")
        x_BWD = self.residual(x_BWD, self.cross_norm, look, None, "cross")
        x_BWD = self.residual(x_BWD, self.feed_forward_norm, lambda x: self.feed_forward(x, None), None, "mlp")
        return x_BWD, cache._replace(self_keys_BHLK=written[0], self_values_BHLK=written[1])
