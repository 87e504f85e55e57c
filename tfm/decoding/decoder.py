"""The compiled, sharded decode of one batch of token ids.

A batch has one of few shapes, which its bucket alone decides, so that neither the batch-mates of a sentence nor their
number can change its translation, and each shape is compiled once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tfm import sharding
from tfm.config import ConfigError, DecodingConfig
from tfm.data.tokenizer import BOS, EOS, PAD
from tfm.decoding import search
from tfm.model.transformer import Transformer, abstract_parameters, decode_step, start_decoding, unstack

_log = logging.getLogger(__name__)

_SHORTEST_BUCKET = 16


class Bucket(NamedTuple):
    """The one shape in which sentences of up to `source_length` tokens, end included, are decoded."""

    rows: int
    source_length: int


class Decoder:
    """Translates batches of token ids with given parameters.

    Args:
      model: whose parameters these are.
      mesh: the batch is split over (data, fsdp), heads and vocabulary over tensor.
      config: shapes and search.
      banned: ids that are never generated.

    Raises:
      ConfigError: a search that isn't there.
    """

    def __init__(self, model: Transformer, mesh: Mesh, config: DecodingConfig, banned: Sequence[int]):
        if config.beam_size != 1:
            raise ConfigError(f"decoding.beam_size={config.beam_size}: only greedy search, 1, is there yet")
        self.model, self.mesh, self.config = model, mesh, config
        self.buckets = _ladder(config, sharding.batch_shards(mesh))
        self.compile_seconds: dict[Bucket, float] = {}
        self._compiled: dict[Bucket, Any] = {}
        self._parameters: Any = None
        table = abstract_parameters(model)["target_embedding"]["table"].unbox()
        forbidden_V = np.arange(table.shape[0]) >= model.vocab_size
        forbidden_V[list(banned)] = True
        self._bias_V = np.where(forbidden_V, -np.inf, 0.0).astype(np.float32)
        axes = sharding.logical_axes(unstack_axes(abstract_parameters(model)))
        self._shardings = sharding.decode_shardings(mesh, axes)
        self._lay_out = jax.jit(self._laid_out, out_shardings=self._shardings)

    def set_parameters(self, parameters: Any) -> None:
        """Takes over the parameters of training: cut into layers, in the compute dtype, laid out for decoding."""
        self._parameters = self._lay_out(parameters)

    def _laid_out(self, parameters: Any) -> Any:
        def cast(path: Any, leaf: jax.Array) -> jax.Array:
            in_norm = any(getattr(key, "key", None) == "norm" for key in path)
            return leaf if in_norm else leaf.astype(self.model.dtype)

        return jax.tree_util.tree_map_with_path(cast, unstack(parameters))

    def bucket_of(self, length: int) -> Bucket:
        """The bucket of a sentence, by its own length alone. ValueError when none is long enough."""
        for bucket in self.buckets:
            if length <= bucket.source_length:
                return bucket
        raise ValueError(f"{length} source tokens, and the longest bucket has {self.buckets[-1].source_length}")

    def decode(self, bucket: Bucket, sentences: Sequence[Sequence[int]]) -> search.Hypotheses:
        """Starts to translate up to `bucket.rows` sentences, each ending in EOS; the result is still on the device."""
        tokens_BS = np.full(bucket, PAD, np.int32)
        for row, sentence in enumerate(sentences):
            tokens_BS[row, : len(sentence)] = sentence
        compiled = self._compiled.get(bucket) or self._compile(bucket)
        return compiled(self._parameters, jax.device_put(tokens_BS, sharding.batch_sharding(self.mesh)))

    def _compile(self, bucket: Bucket) -> Any:
        start = time.perf_counter()
        where = sharding.batch_sharding(self.mesh)
        tokens_BS = jax.ShapeDtypeStruct(bucket, jnp.int32, sharding=where)
        function = jax.jit(self._search, in_shardings=(self._shardings, where), out_shardings=where)
        with jax.set_mesh(self.mesh):
            compiled = function.lower(self._parameters, tokens_BS).compile()
        self._compiled[bucket] = compiled
        self.compile_seconds[bucket] = time.perf_counter() - start
        return compiled

    def _search(self, parameters: Any, tokens_BS: jax.Array) -> search.Hypotheses:
        length = tokens_BS.shape[1] + self.config.max_extra_tokens
        mask_BS = tokens_BS != PAD
        sizes_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
        # The end symbol is no part of what the limit counts, and a row that only pads the batch has nothing to say.
        limits_B = jnp.where(sizes_B > 0, sizes_B - 1 + self.config.max_extra_tokens, 0)
        cache = start_decoding(self.model, parameters, tokens_BS, mask_BS, beams=1, length=length)

        def step(tokens_BW: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            logits_BWV, cache = decode_step(self.model, parameters, tokens_BW, cache)
            return logits_BWV + self._bias_V[None, None], cache

        start_B = jnp.full(tokens_BS.shape[:1], BOS, jnp.int32)
        return search.greedy(step, cache, start_B, limits_B, length=length, eos=EOS)


def unstack_axes(boxed: Any) -> Any:
    """`unstack` of an abstract tree of boxed parameters: each layer's boxes without the name of the stack."""

    def cut(stack: Any) -> Any:
        is_box = dict(is_leaf=lambda x: hasattr(x, "names"))
        layer = jax.tree.map(lambda box: box.replace(names=box.names[1:]), stack["layers"], **is_box)
        depth = jax.tree.leaves(stack["layers"])[0].shape[0]
        return {**stack, "layers": [layer] * depth}

    return {**boxed, "encoder": cut(boxed["encoder"]), "decoder": cut(boxed["decoder"])}


def _ladder(config: DecodingConfig, shards: int) -> list[Bucket]:
    """Powers of two up to the longest source, each with as many rows as the token budget has room for."""
    lengths = []
    length = _SHORTEST_BUCKET
    while length < config.max_source_length:
        lengths.append(length)
        length *= 2
    lengths.append(config.max_source_length)
    return [Bucket(max(1, config.tokens_per_batch // n // shards) * shards, n) for n in lengths]
