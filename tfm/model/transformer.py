"""The stacks, and the ways in: training over whole rows, encoding, one step of decoding, and given translations.

Training scans over the layers, so that compile time does not grow with depth where they aren't unrolled: parameters of
a stack have a leading dimension `layers`. Decoding never scans its cache, which would copy it every token: `unstack`
cuts the parameters into layers once, and `decode_step` goes through them one by one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tfm.config import ModelConfig
from tfm.model.attention import Kernel, LayerCache, Sight, Tokens
from tfm.model.dropout import DropoutKey
from tfm.model.layers import DecoderLayer, Embedding, EncoderLayer, LayerNorm, padded_vocab_size

Parameters = dict[str, Any]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def attention_kernel(config: ModelConfig, platform: str, *, deterministic: bool) -> Kernel:
    """What computes attention in training on a platform ("cpu", "gpu", "tpu"), where it can take the sizes."""
    if config.attention == "plain":
        return "plain"
    if platform == "tpu":
        return "pallas"
    # Nothing promises that cuDNN's backward pass adds up in a fixed order, and GPUs before Ampere have no such kernel.
    if platform == "gpu" and not deterministic:
        capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; none on AMD's
        if capability.partition(".")[0].isdigit() and float(capability) >= 8.0:
            return "cudnn"
    return "plain"


def compute_dtype(config: ModelConfig, platform: str) -> jnp.dtype:
    """Type of matrix products on a platform ("cpu", "gpu", "tpu")."""
    name = config.dtype if config.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


class _Stack(nn.Module):
    """`depth` layers of one kind, scanned, with the closing norm that pre-norm stacks need."""

    layer: type[EncoderLayer | DecoderLayer]
    depth: int
    config: ModelConfig
    dtype: jnp.dtype
    remat: str
    unroll: int

    @nn.compact
    def __call__(self, x: jax.Array, context: tuple[Any, ...], key: DropoutKey | None) -> jax.Array:
        def apply_layer(layer: Any, x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            return layer(x, *context, None if key is None else key.fold_in(index)), None

        if self.remat != "none":
            # prevent_cse guards against an optimisation that undoes all of it, which a loop's body cannot undergo; but
            # layers may be left over behind the loop, and one that turns once is none.
            in_loop = self.depth % self.unroll == 0 and self.depth // self.unroll > 1
            apply_layer = nn.remat(apply_layer, policy=_REMAT_POLICIES[self.remat], prevent_cse=not in_loop)
        scan = nn.scan(
            apply_layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=min(self.unroll, self.depth),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        # The name is explicit, so that a remat policy never renames a parameter.
        x, _ = scan(self.layer(self.config, self.dtype, name="layers"), x, jnp.arange(self.depth))
        return LayerNorm(self.dtype, name="final_norm")(x) if self.config.norm == "pre" else x


class Transformer(nn.Module):
    """The model of training, over packed rows."""

    config: ModelConfig
    vocab_size: int
    dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "none"
    unroll: int = 1
    attention: Kernel = "plain"

    def setup(self) -> None:
        c = self.config
        self.target_embedding = Embedding(c, self.vocab_size, self.dtype)
        self.source_embedding = (
            self.target_embedding if c.tie_embeddings == "all" else Embedding(c, self.vocab_size, self.dtype)
        )
        self.output_embedding = (
            self.target_embedding if c.tie_embeddings != "none" else Embedding(c, self.vocab_size, self.dtype)
        )
        self.encoder = _Stack(EncoderLayer, c.encoder_layers, c, self.dtype, self.remat, self.unroll)
        self.decoder = _Stack(DecoderLayer, c.decoder_layers, c, self.dtype, self.remat, self.unroll)

    def encode(self, tokens_BS: jax.Array, source: Tokens, key: DropoutKey | None = None) -> jax.Array:
        """Memory [B, S, D]."""
        sight = Sight.of(source, source, causal=False, kernel=self.attention)
        key = None if key is None else key.fold_in(0)
        x_BSD = self.source_embedding(tokens_BS, source.positions_BL, key)
        return self.encoder(x_BSD, (sight,), key)

    def decode(
        self,
        tokens_BT: jax.Array,
        target: Tokens,
        memory_BSD: jax.Array,
        source: Tokens,
        key: DropoutKey | None = None,
    ) -> jax.Array:
        """The last layer's output [B, T, D] at every target position; `tokens` are the inputs, each shifted right."""
        self_sight = Sight.of(target, target, causal=True, kernel=self.attention)
        cross_sight = Sight.of(target, source, causal=False, kernel=self.attention)
        key = None if key is None else key.fold_in(1)
        x_BTD = self.target_embedding(tokens_BT, target.positions_BL, key)
        return self.decoder(x_BTD, (memory_BSD, self_sight, cross_sight), key)

    def __call__(
        self,
        source_tokens_BS: jax.Array,
        source: Tokens,
        target_inputs_BT: jax.Array,
        target: Tokens,
        key: DropoutKey | None = None,
    ) -> jax.Array:
        """The decoder's output [B, T, D] at every target position; `logits` or the loss project it."""
        memory_BSD = self.encode(source_tokens_BS, source, key)
        return self.decode(target_inputs_BT, target, memory_BSD, source, key)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the decoder's output, float32, V padded."""
        return self.output_embedding.logits(x_BTD)


@functools.lru_cache(maxsize=16)
def abstract_parameters(model: Transformer) -> Parameters:
    """Shapes of the parameters, each boxed with its logical axes; nothing is allocated."""
    return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def init_parameters(model: Transformer, seed: int) -> Parameters:
    """Plain nested dict of float32 arrays. Jit it with `out_shardings`: no unsharded copy need ever exist."""
    return nn.meta.unbox(_init(model, jax.random.key(seed)))


def _init(model: Transformer, key: jax.Array) -> Parameters:
    tokens = jnp.zeros((1, 1), jnp.int32)
    where = Tokens(tokens, tokens)

    def both(model: Transformer) -> jax.Array:
        return model.logits(model(tokens, where, tokens, where))

    return nn.init(both, model)(key)["params"]


class AttentionWeights(NamedTuple):
    """What each query takes of each key, in every layer and head: shares that sum to 1 over the keys, float32."""

    encoder_NBHSS: jax.Array
    decoder_NBHTT: jax.Array
    cross_NBHTS: jax.Array


def all_attention_weights(
    model: Transformer,
    parameters: Parameters,
    source_tokens_BS: jax.Array,
    source: Tokens,
    target_inputs_BT: jax.Array,
    target: Tokens,
) -> AttentionWeights:
    """The weights of a pass over given sources and targets, whatever kernel the model has."""
    variables, inputs = {"params": parameters}, (source_tokens_BS, source, target_inputs_BT, target)
    _, state = model.apply(variables, *inputs, mutable=["intermediates"])
    encoder, decoder = (state["intermediates"][stack]["layers"] for stack in ("encoder", "decoder"))
    parts = encoder["self_attention"], decoder["self_attention"], decoder["cross_attention"]
    return AttentionWeights(*(part["weights_BHTS"][0] for part in parts))


def output_table(model: Transformer, parameters: Parameters) -> jax.Array:
    """Output embedding [V, D], float32, V padded."""
    return parameters["output_embedding" if model.config.tie_embeddings == "none" else "target_embedding"]["table"]


def count_parameters(model: Transformer) -> int:
    """Number of parameters, without the embedding rows that only pad the table."""
    leaves = jax.tree.leaves(nn.meta.unbox(abstract_parameters(model)))
    tables = {"all": 1, "target": 2, "none": 3}[model.config.tie_embeddings]
    padding = padded_vocab_size(model.vocab_size) - model.vocab_size
    return sum(leaf.size for leaf in leaves) - tables * padding * model.config.d_model


class DecodeCache(NamedTuple):
    """All that decoding remembers between steps: it is passed in and returned, never held by a module.

    Beams are never moved within it. Each writes its keys and values into a slot of its own, and `ancestors` says, of
    every beam, whose slot its past lies in at each position: choosing other beams rearranges these few numbers alone.
    """

    layers: tuple[LayerCache, ...]
    source_mask_BS: jax.Array  # bool; False is padding
    ancestors_BTW: jax.Array  # int32; the beam whose slot holds position t of the past of beam w
    position: jax.Array  # int32; target positions written so far


def unstack(parameters: Parameters) -> Parameters:
    """Parameters with each stack cut into a list of layers, the form that decoding takes."""

    def cut(stack: Parameters) -> Parameters:
        depth = jax.tree.leaves(stack["layers"])[0].shape[0]
        return {**stack, "layers": [jax.tree.map(lambda p, i=i: p[i], stack["layers"]) for i in range(depth)]}

    return {**parameters, "encoder": cut(parameters["encoder"]), "decoder": cut(parameters["decoder"])}


def unstack_axes(boxed: Parameters) -> Parameters:
    """`unstack` of an abstract tree of boxed parameters: each layer's boxes without the name of the stack."""

    def cut(stack: Parameters) -> Parameters:
        is_box = dict(is_leaf=lambda x: hasattr(x, "names"))
        layer = jax.tree.map(lambda box: box.replace(names=box.names[1:]), stack["layers"], **is_box)
        depth = jax.tree.leaves(stack["layers"])[0].shape[0]
        return {**stack, "layers": [layer] * depth}

    return {**boxed, "encoder": cut(boxed["encoder"]), "decoder": cut(boxed["decoder"])}


def start_decoding(
    model: Transformer,
    unstacked: Parameters,
    source_tokens_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    beams: int,
    length: int,
) -> DecodeCache:
    """Encodes sentences, one a row, and lays out a cache for `length` target positions of `beams` hypotheses each."""
    memory_BSD, _ = _encode_unstacked(model, unstacked, source_tokens_BS, mask_BS)
    caches = [
        DecoderLayer(model.config, model.dtype).apply({"params": layer}, memory_BSD, beams, length, method="new_cache")
        for layer in unstacked["decoder"]["layers"]
    ]
    ancestors_BTW = jnp.zeros((source_tokens_BS.shape[0], length, beams), jnp.int32)
    return DecodeCache(tuple(caches), mask_BS, ancestors_BTW, jnp.zeros((), jnp.int32))


def decode_step(
    model: Transformer, unstacked: Parameters, tokens_BW: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, DecodeCache]:
    """Logits [B, W, V] (float32, V padded) after these tokens at the cache's position, and the cache with them.

    At the first position, where all beams are the same, tokens [B, 1] of a single one will do.
    """
    c, dtype, position = model.config, model.dtype, cache.position
    embedding = Embedding(c, model.vocab_size, dtype)
    x_BWD = embedding.apply({"params": unstacked["target_embedding"]}, tokens_BW, position.reshape(1, 1), None)
    (batch, length, slots), beams = cache.ancestors_BTW.shape, tokens_BW.shape[1]
    own_B1W = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32), (batch, 1, beams))
    ancestors_BTW = jax.lax.dynamic_update_slice_in_dim(cache.ancestors_BTW, own_B1W, position, axis=1)
    past_1T11 = (jnp.arange(length) <= position)[None, :, None, None]
    is_own_BTWW = ancestors_BTW[:, :, None, :beams] == jnp.arange(slots, dtype=jnp.int32)[None, None, :, None]
    seen_BLW = (is_own_BTWW & past_1T11).reshape(batch, -1, beams)

    @jax.jit  # by itself, so that it is traced once for all layers: a start with a compiled program is mostly tracing
    def step(parameters: Parameters, x_BWD: jax.Array, layer: LayerCache, *rest: jax.Array) -> Any:
        return DecoderLayer(c, dtype).apply({"params": parameters}, x_BWD, layer, *rest, method="decode_step")

    layers = []
    for parameters, layer in zip(unstacked["decoder"]["layers"], cache.layers, strict=True):
        x_BWD, layer = step(parameters, x_BWD, layer, seen_BLW, cache.source_mask_BS, position * slots)
        layers.append(layer)
    logits_BWV = project(model, unstacked, x_BWD)
    return logits_BWV, cache._replace(layers=tuple(layers), ancestors_BTW=ancestors_BTW, position=position + 1)


def reorder_beams(cache: DecodeCache, parents_BW: jax.Array) -> DecodeCache:
    """The cache of new beams, each of which goes on from the beam `parents` of its sentence."""
    return cache._replace(ancestors_BTW=jnp.take_along_axis(cache.ancestors_BTW, parents_BW[:, None], axis=2))


def decode_forced(
    model: Transformer,
    unstacked: Parameters,
    source_tokens_BS: jax.Array,
    source_mask_BS: jax.Array,
    target_inputs_BT: jax.Array,
) -> jax.Array:
    """The decoder's output [B, T, D] over given targets, all positions at once; `project` makes logits of it.

    Padding at the end of a target may hold anything: nothing before it can see it.
    """
    c, dtype = model.config, model.dtype
    memory_BSD, source = _encode_unstacked(model, unstacked, source_tokens_BS, source_mask_BS)
    positions_1T = jnp.arange(target_inputs_BT.shape[1])[None]
    target = Tokens(jnp.ones_like(target_inputs_BT), positions_1T)
    embedding = Embedding(c, model.vocab_size, dtype)
    x_BTD = embedding.apply({"params": unstacked["target_embedding"]}, target_inputs_BT, positions_1T, None)
    self_sight = Sight.of(target, target, causal=True)
    cross_sight = Sight.of(target, source, causal=False)
    for layer in unstacked["decoder"]["layers"]:
        x_BTD = DecoderLayer(c, dtype).apply({"params": layer}, x_BTD, memory_BSD, self_sight, cross_sight, None)
    return x_BTD


def project(model: Transformer, unstacked: Parameters, x: jax.Array) -> jax.Array:
    """Logits [..., V] (float32, V padded) of the last decoder layer's output."""
    table = {"table": output_table(model, unstacked)}
    x = _final_norm(model, unstacked["decoder"], x)
    return Embedding(model.config, model.vocab_size, model.dtype).apply({"params": table}, x, method="logits")


def _encode_unstacked(
    model: Transformer, unstacked: Parameters, tokens_BS: jax.Array, mask_BS: jax.Array
) -> tuple[jax.Array, Tokens]:
    """Memory [B, S, D] of sentences, one a row, and where their tokens stand."""
    c, dtype = model.config, model.dtype
    positions_1S = jnp.arange(tokens_BS.shape[1])[None]
    source = Tokens(mask_BS.astype(jnp.int32), positions_1S)
    table = unstacked["target_embedding" if c.tie_embeddings == "all" else "source_embedding"]
    x_BSD = Embedding(c, model.vocab_size, dtype).apply({"params": table}, tokens_BS, positions_1S, None)
    sight = Sight.of(source, source, causal=False)

    @jax.jit  # by itself, as a layer of `decode_step` is
    def encode(parameters: Parameters, x_BSD: jax.Array, sight: Sight) -> jax.Array:
        return EncoderLayer(c, dtype).apply({"params": parameters}, x_BSD, sight, None)

    for layer in unstacked["encoder"]["layers"]:
        x_BSD = encode(layer, x_BSD, sight)
    return _final_norm(model, unstacked["encoder"], x_BSD), source


def _final_norm(model: Transformer, stack: Parameters, x: jax.Array) -> jax.Array:
    if model.config.norm == "post":
        return x
    return LayerNorm(model.dtype).apply({"params": stack["final_norm"]}, x)
