"""The compiled, sharded decode of one batch of token ids: search, sampling, and the scores of given translations.

A batch has one of few shapes, which its bucket alone decides, so that neither the batch-mates of a sentence nor their
number can change its translation, and each shape is compiled once. The devices split a batch and then work alone: no
search waits for another device, unless heads and vocabulary are split over `tensor`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tfm import sharding
from tfm.config import ConfigError, DecodingConfig
from tfm.data.tokenizer import BOS, EOS, PAD
from tfm.decoding import search
from tfm.decoding.beam import beam_search
from tfm.decoding.vocabulary import Vocabulary
from tfm.model import transformer
from tfm.model.transformer import Transformer, abstract_parameters

_SHORTEST_BUCKET = 16
# A batch for those that were given up has this part of the rows of another: there are few.
_LONG_ROWS = 4
# Target positions whose logits are there at once while given translations are scored.
_SCORED_AT_ONCE = 1024


class Bucket(NamedTuple):
    """The one shape in which sentences of up to `length` tokens, end included, are decoded."""

    rows: int
    length: int
    room: int  # target positions
    gives_up: bool = False  # on sentences that go on for longer than usual


_Program = tuple[str, Bucket, bool]  # "search" or "score", its shape, and whether translations begin freely


class Sentences(NamedTuple):
    """A batch of sentences, one a row; a row of padding alone fills the batch up."""

    source_BS: Any  # int32, each sentence ending in EOS
    prefix_BT: Any = None  # int32, or None; what each translation begins with, and -1 behind that
    draw_B2: Any = None  # uint32, or None; makes what is drawn for one sentence differ from what is for another
    target_BT: Any = None  # int32, or None; given translations, each ending in EOS


def check_beam(beams: int, vocab_size: int, banned: Sequence[int], field: str = "decoding.beam_size") -> None:
    """Raises ConfigError, naming the field, at a beam of more hypotheses than there are tokens that are not banned."""
    if beams > (most := vocab_size - len(banned)):
        raise ConfigError(f"{field}={beams} is more than the {most} tokens that can be generated: lower it")


class Decoder:
    """Translates batches of token ids with given parameters, of one model or of several together.

    Args:
      models: whose parameters these are.
      mesh: the batch is split over (data, fsdp), heads and vocabulary over tensor.
      config: shapes and search.
      banned: ids that are never generated.
      scores: whether the log-probabilities of translations are wanted. Greedy search is quicker without.

    Raises:
      ConfigError: a beam of more hypotheses than there are tokens.
    """

    def __init__(
        self,
        models: Sequence[Transformer],
        mesh: Mesh,
        config: DecodingConfig,
        banned: Sequence[int],
        *,
        scores: bool = True,
    ):
        self.models, self.mesh, self.config, self.scores = tuple(models), mesh, config, scores
        vocab_size = self.models[0].vocab_size
        if not config.sampling:
            check_beam(config.beam_size, vocab_size, banned)
        shards = sharding.batch_shards(mesh)
        extra = config.max_extra_tokens
        ladder = _ladder(config, config.max_source_length, shards)
        # A sentence that goes on for longer than usual is given up, and decoded anew in the bucket of `long_buckets`
        # that has the same length, so that no other has to wait for it.
        self.long_buckets = [
            Bucket(-(-rows // _LONG_ROWS // shards) * shards, length, length + extra) for rows, length in ladder
        ]
        self.buckets = [
            Bucket(rows, length, min(self._usual(length), length + extra), self._usual(length) < length + extra)
            for rows, length in ladder
        ]
        ladder = _ladder(config, config.max_source_length + extra, shards)
        self.score_buckets = [Bucket(rows, length, length) for rows, length in ladder]
        self.compile_stages: dict[_Program, tuple[float, float, float]] = {}
        """Seconds that tracing, lowering and compiling took."""
        self._compiled: dict[_Program, jax.stages.Compiled] = {}
        self._parameters: Any = None
        boxed = [abstract_parameters(model) for model in self.models]
        padded_size = boxed[0]["target_embedding"]["table"].unbox().shape[0]
        self._banned = (*banned, *range(vocab_size, padded_size))
        self._vocabulary = Vocabulary(padded_size, EOS, self._banned)
        axes = [sharding.logical_axes(transformer.unstack_axes(tree)) for tree in boxed]
        self._shardings = tuple(sharding.decode_shardings(mesh, tree) for tree in axes)
        self._lay_out = jax.jit(self._laid_out, out_shardings=self._shardings)

    def _usual(self, length: Any) -> Any:
        """Target positions that suffice for nearly all translations of a source of that length, and for the search."""
        return length + length // 4 + 8 + self.config.min_length

    def set_parameters(self, *parameters: Any) -> None:
        """Takes over the parameters of training, of each model: cut into layers, in the compute dtype, laid out."""
        self._parameters = None  # before there are new ones: two copies may be too many
        self._parameters = self._lay_out(parameters)

    def abstract_parameters(self) -> tuple[Any, ...]:
        """Shapes of what `set_parameters` makes of the parameters of each model, and where they lie."""
        trees = tuple(sharding.unboxed(abstract_parameters(model)) for model in self.models)
        return sharding.placed(jax.eval_shape(self._laid_out, trees), self._shardings)

    def drop_parameters(self) -> None:
        """Gives back the memory of the parameters that were taken over."""
        self._parameters = None

    def _laid_out(self, parameters: tuple[Any, ...]) -> tuple[Any, ...]:
        def cast(dtype: jnp.dtype, path: Any, leaf: jax.Array) -> jax.Array:
            in_norm = any(getattr(key, "key", None) == "norm" for key in path)
            return leaf if in_norm else leaf.astype(dtype)

        return tuple(
            jax.tree_util.tree_map_with_path(functools.partial(cast, model.dtype), transformer.unstack(tree))
            for model, tree in zip(self.models, parameters, strict=True)
        )

    def decode(
        self,
        bucket: Bucket,
        sentences: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]] | None = None,
        draws: Sequence[tuple[int, int]] | None = None,
    ) -> search.Hypotheses:
        """Starts to translate up to `bucket.rows` sentences, each ending in EOS; the result is still on the device.

        Args:
          bucket: the shape; in one of `buckets`, sentences may be given up.
          sentences: token ids.
          prefixes: tokens that each translation begins with, fewer than `bucket.room`; none when None.
          draws: with sampling, what makes the draws of one sentence differ from those of another: two numbers below
            2**32.
        """
        rows = self._rows(bucket, sentences, draws)
        if prefixes is not None:
            rows = rows._replace(prefix_BT=_filled((bucket.rows, bucket.room), prefixes, -1))
        return self._run(functools.partial(self._search, bucket), "search", bucket, rows)

    def _rows(
        self, bucket: Bucket, sentences: Sequence[Sequence[int]], draws: Sequence[tuple[int, int]] | None = None
    ) -> Sentences:
        source_BS = _filled((bucket.rows, bucket.length), sentences, PAD)
        if not self.config.sampling:
            return Sentences(source_BS)
        draw_B2 = np.zeros((bucket.rows, 2), np.uint32)
        if draws is None:
            draw_B2[:, 0] = np.arange(bucket.rows)
        else:
            draw_B2[: len(sentences)] = np.reshape(draws, (-1, 2))
        return Sentences(source_BS, draw_B2=draw_B2)

    def search_program(self, bucket: Bucket) -> jax.stages.Compiled:
        """The compiled program that `decode` runs in a bucket without prefixes."""
        return self._program(functools.partial(self._search, bucket), "search", bucket, self._rows(bucket, []))

    def score(self, bucket: Bucket, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> jax.Array:
        """Starts to score given translations: log-probability [B, T] of each token, the end included; 0 in padding."""
        shape = (bucket.rows, bucket.length)
        rows = Sentences(_filled(shape, sources, PAD), target_BT=_filled(shape, targets, PAD))
        return self._run(self._score, "score", bucket, rows)

    def _run(self, function: Callable[..., Any], name: str, bucket: Bucket, rows: Sentences) -> Any:
        program = self._program(function, name, bucket, rows)
        return program(self._parameters, sharding.rows_on_mesh(rows, self.mesh))

    def _program(self, function: Callable[..., Any], name: str, bucket: Bucket, rows: Sentences) -> Any:
        """The compiled function for rows of these shapes."""
        key = (name, bucket, rows.prefix_BT is None)
        if key not in self._compiled:
            where = sharding.batch_sharding(self.mesh)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), rows)
            program = jax.jit(sharding.per_device(function, self.mesh), in_shardings=(self._shardings, where))
            times = [time.perf_counter()]
            with jax.set_mesh(self.mesh):
                traced = program.trace(self._parameters, shapes)
                times.append(time.perf_counter())
                lowered = traced.lower()
                times.append(time.perf_counter())
                self._compiled[key] = lowered.compile()
            times.append(time.perf_counter())
            self.compile_stages[key] = tuple(np.diff(times).tolist())
        return self._compiled[key]

    def _search(self, bucket: Bucket, parameters: tuple[Any, ...], rows: Sentences) -> search.Hypotheses:
        """The whole search for the rows that one device has."""
        c = self.config
        mask_BS = rows.source_BS != PAD
        sizes_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
        # The end symbol is no part of what the limit counts, and a row that only fills the batch has nothing to say.
        most_B = jnp.where(sizes_B > 0, sizes_B - 1 + c.max_extra_tokens, 0)
        # By its own length, not by the bucket's or by its batch-mates': what becomes of a sentence depends on it alone.
        patience_B = self._usual(sizes_B) if bucket.gives_up else bucket.room
        limits = search.Limits(jnp.minimum(c.min_length, most_B), most_B, patience_B, rows.prefix_BT)
        beams = c.n_best if c.sampling else c.beam_size
        symbols = {"bos": BOS, "eos": EOS, "banned": self._banned}
        start = tuple(
            transformer.start_decoding(model, tree, rows.source_BS, mask_BS, beams=beams, length=bucket.room)
            for model, tree in zip(self.models, parameters, strict=True)
        )
        cache = search.Cache(start, bucket.room, self._reorder)
        step = functools.partial(self._step, parameters)
        if c.sampling:
            fold_in, seed = jax.random.fold_in, jax.random.key(c.sampling_seed)
            keys_B = jax.vmap(lambda draw_2: fold_in(fold_in(seed, draw_2[0]), draw_2[1]))(rows.draw_B2)
            return search.sample(
                *(step, cache, limits, keys_B),
                samples=c.n_best,
                temperature=c.sampling_temperature,
                top_k=c.sampling_top_k,
                top_p=c.sampling_top_p,
                **symbols,
            )
        if beams == 1:
            return search.greedy(step, cache, limits, scores=self.scores, **symbols)
        return beam_search(step, cache, limits, beams=beams, n_best=c.n_best, alpha=c.length_penalty, **symbols)

    def _step(self, parameters: tuple[Any, ...], tokens_BW: jax.Array, caches: tuple[Any, ...]) -> tuple[Any, Any]:
        """One step of all models: logits [B, W, V] and the caches."""
        results = [
            transformer.decode_step(model, tree, tokens_BW, cache)
            for model, tree, cache in zip(self.models, parameters, caches, strict=True)
        ]
        return self._mean_of_models([logits_BWV for logits_BWV, _ in results]), tuple(cache for _, cache in results)

    def _reorder(self, caches: tuple[Any, ...], parents_BW: jax.Array) -> tuple[Any, ...]:
        return tuple(transformer.reorder_beams(cache, parents_BW) for cache in caches)

    def _mean_of_models(self, logits: Sequence[jax.Array]) -> jax.Array:
        """Logits of all models as one; what is banned counts in none of them."""
        if len(logits) == 1:
            return logits[0]
        log_probs = jnp.stack([jax.nn.log_softmax(self._vocabulary.masked(part), axis=-1) for part in logits])
        if self.config.ensemble_mean == "probs":
            return jax.nn.logsumexp(log_probs, axis=0)
        return jnp.mean(log_probs, axis=0)

    def _score(self, parameters: tuple[Any, ...], rows: Sentences) -> jax.Array:
        """Log-probabilities [B, T] for the rows that one device has."""
        target_BT, mask_BS = rows.target_BT, rows.source_BS != PAD
        inputs_BT = jnp.pad(target_BT, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]
        outputs = [
            transformer.decode_forced(model, tree, rows.source_BS, mask_BS, inputs_BT)
            for model, tree in zip(self.models, parameters, strict=True)
        ]

        def row(outputs_TD: tuple[jax.Array, ...], target_T: jax.Array) -> jax.Array:
            parts = zip(self.models, parameters, outputs_TD, strict=True)
            logits = [transformer.project(model, tree, x_TD[None]) for model, tree, x_TD in parts]
            logits_1TV = self._mean_of_models(logits)
            peak_1T, rest_1T = self._vocabulary.log_normaliser(logits_1TV, self._vocabulary.maxima(logits_1TV))
            return (self._vocabulary.logits_of(logits_1TV, target_T[None]) - peak_1T - rest_1T)[0]

        # The logits of all positions at once may be more than there is room for. What divides the rows leaves no rest,
        # which would be a program of another shape, whose sums may round otherwise.
        most = max(1, _SCORED_AT_ONCE // target_BT.shape[1])
        at_once = max(count for count in range(1, most + 1) if target_BT.shape[0] % count == 0)
        log_probs_BT = jax.lax.map(lambda args: row(*args), (tuple(outputs), target_BT), batch_size=at_once)
        return jnp.where(target_BT == PAD, 0.0, log_probs_BT)


def _filled(shape: tuple[int, int], sequences: Sequence[Sequence[int]], value: int) -> np.ndarray:
    filled = np.full(shape, value, np.int32)
    for row, sequence in enumerate(sequences):
        filled[row, : len(sequence)] = sequence
    return filled


def bucket_of(buckets: Sequence[Bucket], length: int) -> Bucket:
    """The bucket of a sentence, by its own length alone. ValueError when none is long enough."""
    for bucket in buckets:
        if length <= bucket.length:
            return bucket
    raise ValueError(f"{length} tokens, and the longest bucket has {buckets[-1].length}")


def _ladder(config: DecodingConfig, longest: int, shards: int) -> list[tuple[int, int]]:
    """(rows, length): powers of two up to the longest, each with as many rows as the budgets have room for."""
    lengths = []
    length = _SHORTEST_BUCKET
    while length < longest:
        lengths.append(length)
        length *= 2
    lengths.append(longest)
    most = config.sentences_per_batch or config.tokens_per_batch
    return [(max(1, min(most, config.tokens_per_batch // n) // shards) * shards, n) for n in lengths]
