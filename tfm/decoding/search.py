"""Search over `step_fn(tokens, cache) -> (logits, cache)`: what all searches share, greedy search and sampling.

Nothing of it, nor of `beam`, knows a model; both are tested on tables of numbers.

Every hypothesis ends in the end symbol, which is forced on it where it has as many tokens as it may have, so that its
log-probability is that of a whole translation, however it came to its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tfm.decoding.vocabulary import Vocabulary, truncated

StepFunction = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class Hypotheses(NamedTuple):
    """The result of a search: W translations of each of B sentences, the best first; log-probability -inf is none."""

    tokens_BWT: jax.Array  # int32; the end symbol and what follows it are `eos`
    lengths_BW: jax.Array  # int32; tokens before the end symbol
    log_probs_BW: jax.Array  # float32; log-probability of the tokens and the end symbol, or 0 where nobody wants it
    is_whole_B: jax.Array  # bool; False where the search was given up, and the rest means nothing


class Limits(NamedTuple):
    """What a search must keep to, a sentence."""

    least_B: jax.Array  # int32; tokens that a hypothesis has at least, the end symbol not counted
    most_B: jax.Array  # int32; and at most
    patience_B: jax.Array | int  # int32; steps after which a sentence that still goes on is given up
    prefix_BT: jax.Array | None = None  # int32; tokens that every hypothesis begins with; -1 where it is free


def _as_it_is(cache: Any, _: Any) -> Any:
    return cache


class Cache(NamedTuple):
    """What the step function remembers, and what a search asks of it; it never looks inside."""

    start: Any  # of no token yet
    length: int  # positions that it has room for: enough for the longest hypothesis and its end symbol, or for patience
    reorder: Callable[[Any, jax.Array], Any] = _as_it_is  # the cache of new beams, given the parents [B, W] of each


def run(step: Callable[[Any], Any], ended: Callable[[Any], jax.Array], state: Any, limits: Limits, length: int) -> Any:
    """Steps until every sentence has ended or is given up."""

    def goes_on(state: Any) -> jax.Array:
        return (state.position < length) & jnp.any(~ended(state) & (state.position < limits.patience_B))

    return jax.lax.while_loop(goes_on, step, state)


def prefix_at(position: jax.Array, limits: Limits) -> jax.Array:
    """The token [B] that is forced at a position; -1 where it is free."""
    length = limits.prefix_BT.shape[1]
    forced_B = jax.lax.dynamic_index_in_dim(limits.prefix_BT, jnp.minimum(position, length - 1), axis=1, keepdims=False)
    return jnp.where(position < length, forced_B, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Walk:
    """What walks of one token after another carry along."""

    position: jax.Array  # int32 []; tokens written so far
    tokens_TBW: jax.Array  # what was written
    last_BW: jax.Array  # the newest token of each walk: the next step's input
    finished_BW: jax.Array  # has the end symbol been written?
    log_probs_BW: jax.Array
    cache: Any


def greedy(
    step_fn: StepFunction,
    cache: Cache,
    limits: Limits,
    *,
    bos: int,
    eos: int,
    banned: Sequence[int] = (),
    scores: bool = True,
) -> Hypotheses:
    """The likeliest token at each step, until the end symbol; the first of equals.

    Args:
      step_fn: tokens [B, 1] and the cache to logits [B, 1, V] of the next token and the cache.
      cache: of the step function.
      limits: of each sentence.
      bos: the token that every walk starts from.
      eos: id of the end symbol.
      banned: ids that are never generated, whatever their logits are.
      scores: whether log-probabilities are wanted. Without them, the sums over the vocabulary are left out, and the
        step that would only tell how likely the end is where it is forced.
    """

    def choose(
        vocabulary: Vocabulary, logits_BWV: jax.Array, maxima_BWG: jax.Array, may_end_B: jax.Array, _: jax.Array
    ) -> jax.Array:
        best_B1, _, tokens_B1 = vocabulary.best_tokens(logits_BWV, maxima_BWG, jnp.zeros(logits_BWV.shape[:2]), 1)
        end_B1 = vocabulary.logits_of_end(logits_BWV)
        ends_B1 = (end_B1 > best_B1) | ((end_B1 == best_B1) & (eos < tokens_B1))
        return jnp.where(ends_B1 & may_end_B[:, None], eos, tokens_B1)

    return _walk(step_fn, cache, limits, choose, walks=1, bos=bos, eos=eos, banned=banned, scores=scores)


def sample(
    step_fn: StepFunction,
    cache: Cache,
    limits: Limits,
    keys_B: jax.Array,
    *,
    samples: int,
    temperature: float,
    top_k: int,
    top_p: float,
    bos: int,
    eos: int,
    banned: Sequence[int] = (),
) -> Hypotheses:
    """`samples` translations a sentence, each token drawn from the model's distribution; the likeliest first.

    Args:
      step_fn, cache, limits, bos, eos, banned: as for `greedy`, with `samples` in the place of beams.
      keys_B: random keys of the sentences (`jax.random.key`); nothing else makes two sentences differ.
      samples: W of the result.
      temperature: logits are divided by it.
      top_k: only so many of the likeliest tokens can be drawn; 0 is all.
      top_p: only the likeliest tokens that have together at least this probability can be drawn; 1 is all.
    """

    def choose(
        vocabulary: Vocabulary, logits_BWV: jax.Array, _: jax.Array, may_end_B: jax.Array, position: jax.Array
    ) -> jax.Array:
        is_end_11V = jnp.arange(logits_BWV.shape[-1])[None, None] == eos
        logits_BWV = jnp.where(is_end_11V & ~may_end_B[:, None, None], -jnp.inf, vocabulary.masked(logits_BWV))

        def noise(key: jax.Array, number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, number), position)
            return jax.random.gumbel(key, logits_BWV.shape[-1:])

        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise_BWV = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(keys_B, jnp.arange(samples))
        noisy_BWV = truncated(logits_BWV / temperature, top_k, top_p) + noise_BWV
        return jnp.argmax(noisy_BWV, axis=-1).astype(jnp.int32)

    found = _walk(step_fn, cache, limits, choose, walks=samples, bos=bos, eos=eos, banned=banned, scores=True)
    order_BW = jnp.argsort(-found.log_probs_BW, axis=1)
    return found._replace(
        tokens_BWT=jnp.take_along_axis(found.tokens_BWT, order_BW[..., None], axis=1),
        lengths_BW=jnp.take_along_axis(found.lengths_BW, order_BW, axis=1),
        log_probs_BW=jnp.take_along_axis(found.log_probs_BW, order_BW, axis=1),
    )


def _walk(
    step_fn: StepFunction,
    cache: Cache,
    limits: Limits,
    choose: Callable[[Vocabulary, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    walks: int,
    bos: int,
    eos: int,
    banned: Sequence[int],
    scores: bool,
) -> Hypotheses:
    """Walks until the end symbol, each going on with the token [B, W] that `choose` picks.

    `choose` is given the vocabulary, the logits [B, W, V], their maxima, whether sentences may end here [B], and the
    position.
    """
    batch, length = limits.most_B.shape[0], cache.length

    def step(state: _Walk) -> _Walk:
        position = state.position
        logits_BWV, inner = step_fn(state.last_BW, state.cache)
        vocabulary = Vocabulary(logits_BWV.shape[-1], eos, banned)
        maxima_BWG = vocabulary.maxima(logits_BWV)
        tokens_BW = choose(vocabulary, logits_BWV, maxima_BWG, position >= limits.least_B, position)
        if limits.prefix_BT is not None:
            forced_B1 = prefix_at(position, limits)[:, None]
            tokens_BW = jnp.where(forced_B1 < 0, tokens_BW, forced_B1)
        tokens_BW = jnp.where(position >= limits.most_B[:, None], eos, tokens_BW)
        if scores:
            peak_BW, rest_BW = vocabulary.log_normaliser(logits_BWV, maxima_BWG)
            log_probs_BW = vocabulary.logits_of(logits_BWV, tokens_BW) - peak_BW - rest_BW
        else:
            log_probs_BW = jnp.where(jnp.isfinite(vocabulary.peak(logits_BWV, maxima_BWG)), 0.0, jnp.nan)
        # Not a number: the walk ends, rather than go on to its limit without knowing where.
        tokens_BW = jnp.where(state.finished_BW | jnp.isnan(log_probs_BW), eos, tokens_BW)
        ends_BW = tokens_BW == eos if scores else (tokens_BW == eos) | (position + 1 >= limits.most_B)[:, None]
        return _Walk(
            position + 1,
            jax.lax.dynamic_update_index_in_dim(state.tokens_TBW, tokens_BW, position, axis=0),
            tokens_BW,
            state.finished_BW | ends_BW,
            state.log_probs_BW + jnp.where(state.finished_BW, 0.0, log_probs_BW),
            inner,
        )

    def ended(state: _Walk) -> jax.Array:
        return jnp.all(state.finished_BW, axis=1)

    start = _Walk(
        jnp.zeros((), jnp.int32),
        jnp.full((length, batch, walks), eos, jnp.int32),
        jnp.full((batch, walks), bos, jnp.int32),
        jnp.zeros((batch, walks), bool),
        jnp.zeros((batch, walks)),
        cache.start,
    )
    end = run(step, ended, start, limits, length)
    tokens_BWT = end.tokens_TBW.transpose(1, 2, 0)
    lengths_BW = jnp.sum(jnp.cumprod((tokens_BWT != eos).astype(jnp.int32), axis=2), axis=2)
    # One that ended beyond its patience did so in company of a more patient one: alone, it would have been given up.
    in_time_B = jnp.max(lengths_BW, axis=1) < limits.patience_B
    return Hypotheses(tokens_BWT, lengths_BW, end.log_probs_BW, ended(end) & in_time_B)
