"""Masks, scaled dot-product attention and multi-head attention (Vaswani et al., 2017, sections 3.2.1 to 3.2.3).

Attention is told segment ids, positions and whether it is causal (`Sight`). The path that XLA compiles goes by a mask
that is made of them; a fused kernel takes its place on TPUs, and cuDNN's on GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tfm.config import ModelConfig
from tfm.model.dropout import DropoutKey, dropout
from tfm.model.projection import Projection, matmul_precision
from tfm.sharding import constrain

Kernel = Literal["plain", "pallas", "cudnn"]

_WIDEST_CUDNN_HEAD = 128

# Finite, so that a query with no key at all (padding) gives a number instead of NaN.
MASKED = -1e9


class Tokens(NamedTuple):
    """Where the tokens of a sequence stand: all that attention needs to know of them."""

    segments_BL: jax.Array  # int32; which pair of the row a token belongs to, from 1; 0 is padding
    positions_BL: jax.Array  # int32; position within the pair, from 0; [1, L] where they are the same in each row


def attention_mask(queries: Tokens, keys: Tokens, *, causal: bool) -> jax.Array:
    """Bool [B, T, S]: may the query see the key? Only within its own segment and, if causal, not ahead of itself."""
    mask_BTS = queries.segments_BL[:, :, None] == keys.segments_BL[:, None, :]
    if causal:
        mask_BTS &= queries.positions_BL[:, :, None] >= keys.positions_BL[:, None, :]
    return mask_BTS


@partial(
    jax.tree_util.register_dataclass, data_fields=["queries", "keys", "mask_BTS"], meta_fields=["causal", "kernel"]
)
@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys each query may see."""

    queries: Tokens
    keys: Tokens
    causal: bool
    mask_BTS: jax.Array  # of `attention_mask`
    kernel: Kernel  # that may take the place of what XLA compiles, where it can take the sizes

    @classmethod
    def of(cls, queries: Tokens, keys: Tokens, *, causal: bool, kernel: Kernel = "plain") -> Sight:
        """With the mask [B, T, S] that both sides make."""
        return cls(queries, keys, causal, attention_mask(queries, keys, causal=causal), kernel)


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BTS: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    site: int = 0,
) -> jax.Array:
    """softmax(Q Kᵀ / √d_k) V, equation 1, the softmax in float32. `v` may have another head width. [B, T, H, K_v]."""
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask_BTS)
    weights_BHTS = dropout(weights_BHTS.astype(v_BSHK.dtype), dropout_rate, dropout_key, site)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK, precision=matmul_precision(q_BTHK.dtype))


def attention_weights(q_BTHK: jax.Array, k_BSHK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(Q Kᵀ / √d_k) [B, H, T, S], float32: the share that a query takes of each key's value."""
    q_BTHK = q_BTHK / math.sqrt(q_BTHK.shape[-1])
    precision = matmul_precision(q_BTHK.dtype)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, precision=precision, preferred_element_type=jnp.float32)
    scores_BHTS = constrain(scores_BHTS, "activation_batch", "activation_heads", "activation_length", None)
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, MASKED), axis=-1)


def _fused(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, sight: Sight) -> jax.Array | None:
    """What the kernel makes of it; None where there is none, or it cannot take such sizes."""
    if sight.kernel == "cudnn":
        return _cudnn(q_BTHK, k_BSHK, v_BSHK, sight.mask_BTS)
    return _pallas(q_BTHK, k_BSHK, v_BSHK, sight) if sight.kernel == "pallas" else None


def _cudnn(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask_BTS: jax.Array) -> jax.Array | None:
    (queries, width), keys = q_BTHK.shape[1::2], k_BSHK.shape[1]
    takes = q_BTHK.dtype == jnp.bfloat16 and width == v_BSHK.shape[-1]
    if not takes or width % 8 or width > _WIDEST_CUDNN_HEAD or queries % 2 or keys % 2:
        return None
    # A query without any key, padding where its source has none, would be NaN there, and make its keys' gradients NaN:
    # it is shown all of them, and nothing comes of it.
    blind_BT1 = ~jnp.any(mask_BTS, axis=-1, keepdims=True)
    mask_B1TS = constrain((mask_BTS | blind_BT1)[:, None], "activation_batch", None, None, None)
    return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=mask_B1TS, implementation="cudnn")


def _pallas(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, sight: Sight) -> jax.Array | None:
    from tfm.model.fused_attention import fits, fused_attention  # Pallas takes half a second to import

    flat, width = [x.reshape(*x.shape[:2], -1) for x in (q_BTHK, k_BSHK, v_BSHK)], q_BTHK.shape[-1]
    if not fits(*flat, width):
        return None
    segments = sight.queries.segments_BL, sight.keys.segments_BL
    return fused_attention(*flat, *segments, width=width, causal=sight.causal).reshape(q_BTHK.shape)


def attend_once(q_BWHK: jax.Array, k_BHLK: jax.Array, v_BHLK: jax.Array, mask_BLW: jax.Array) -> jax.Array:
    """One query of each beam over the same L keys, each beam seeing its own part of them. [B, W, H, K_v].

    Written for the compiler of CPUs, whose time for the same products varies twentyfold with their form: heads come
    before lengths, keys stand on the left of the first product, and nothing of the last one is transposed within it.
    """
    precision = matmul_precision(q_BWHK.dtype)
    q_BHWK = q_BWHK.swapaxes(1, 2) / math.sqrt(q_BWHK.shape[-1])
    scores_BHLW = jnp.einsum("BHLK,BHWK->BHLW", k_BHLK, q_BHWK, precision=precision, preferred_element_type=jnp.float32)
    scores_BHWL = jnp.where(mask_BLW[:, None], scores_BHLW, MASKED).swapaxes(2, 3)
    weights_BHWL = jax.nn.softmax(scores_BHWL, axis=-1).astype(v_BHLK.dtype)
    out_BHWK = jnp.einsum("BHWL,BHLK->BHWK", weights_BHWL, v_BHLK, precision=precision)
    return jax.lax.optimization_barrier(out_BHWK).swapaxes(1, 2)


class LayerCache(NamedTuple):
    """What one decoder layer remembers of a batch of sentences while they are translated.

    Both parts belong to the sentence, and its beams share them. The self-attention of position t has a slot for each
    beam w, t * W + w, which is never moved: which slots are a beam's own past is said by `DecodeCache.ancestors_BTW`.
    """

    self_keys_BHLK: jax.Array
    self_values_BHLK: jax.Array
    cross_keys_BHSK: jax.Array
    cross_values_BHSK: jax.Array


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) of section 3.2.2; no biases, as there."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        c = self.config
        axes_in, axes_out = ("embed", "heads", "kv"), ("heads", "kv", "embed")
        self.query = Projection((c.d_model,), (c.num_heads, c.key_width), axes_in, self.dtype)
        self.key = Projection((c.d_model,), (c.num_heads, c.key_width), axes_in, self.dtype)
        self.value = Projection((c.d_model,), (c.num_heads, c.value_width), axes_in, self.dtype)
        self.output = Projection((c.num_heads, c.value_width), (c.d_model,), axes_out, self.dtype)

    def keys_and_values(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, H, K] and values [B, S, H, K_v] of a sequence."""
        axes = ("activation_batch", "activation_length", "activation_heads", "activation_kv")
        return constrain(self.key(memory_BSD), *axes), constrain(self.value(memory_BSD), *axes)

    def __call__(
        self, x_BTD: jax.Array, memory_BSD: jax.Array, sight: Sight, key: DropoutKey | None, site: int
    ) -> jax.Array:
        """[B, T, D]: what each position of `x` takes from `memory`, which is `x` itself in self-attention."""
        q_BTHK = constrain(
            self.query(x_BTD), "activation_batch", "activation_length", "activation_heads", "activation_kv"
        )
        k_BSHK, v_BSHK = self.keys_and_values(memory_BSD)
        if self.is_mutable_collection("intermediates"):  # asked for by `transformer.all_attention_weights` alone
            self.sow("intermediates", "weights_BHTS", attention_weights(q_BTHK, k_BSHK, sight.mask_BTS))
        rate = self.config.attention_dropout_rate if key is not None else 0.0
        out_BTHK = _fused(q_BTHK, k_BSHK, v_BSHK, sight) if rate == 0.0 else None
        if out_BTHK is None:
            out_BTHK = dot_product_attention(
                q_BTHK, k_BSHK, v_BSHK, sight.mask_BTS, dropout_rate=rate, dropout_key=key, site=site
            )
        return self.output(out_BTHK)

    def decode_self(
        self,
        x_BWD: jax.Array,
        keys_BHLK: jax.Array,
        values_BHLK: jax.Array,
        seen_BLW: jax.Array,
        slot: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One position of causal self-attention: beam w of `x` attends to the slots l where `seen` is true.

        Returns the output [B, W, D] and the keys and values with those of the beams written, from `slot` on.
        """
        axes = ("activation_batch", "activation_heads", "activation_length", "activation_kv")
        k_BHWK, v_BHWK = (kv_BWHK.swapaxes(1, 2) for kv_BWHK in self.keys_and_values(x_BWD))
        keys_BHLK = constrain(jax.lax.dynamic_update_slice_in_dim(keys_BHLK, k_BHWK, slot, axis=2), *axes)
        values_BHLK = constrain(jax.lax.dynamic_update_slice_in_dim(values_BHLK, v_BHWK, slot, axis=2), *axes)
        out_BWHK = attend_once(self.query(x_BWD), keys_BHLK, values_BHLK, seen_BLW)
        return self.output(out_BWHK), keys_BHLK, values_BHLK

    def decode_cross(
        self, x_BWD: jax.Array, keys_BHSK: jax.Array, values_BHSK: jax.Array, source_mask_BS: jax.Array
    ) -> jax.Array:
        """One position of cross-attention, [B, W, D]; a sentence's beams are its queries, and so share its keys."""
        return self.output(attend_once(self.query(x_BWD), keys_BHSK, values_BHSK, source_mask_BS[:, :, None]))
