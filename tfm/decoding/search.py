"""Search over `step_fn(tokens, cache) -> (logits, cache)`: it knows no model, and is tested on tables of numbers.

Every hypothesis ends in the end symbol, which is forced on it where it has as many tokens as it may have, so that its
log-probability is that of a whole translation, however it came to its end.

Dimension R: complete hypotheses that are kept.
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
    log_probs_BW: jax.Array  # float32; log-probability of the tokens and the end symbol
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


def length_penalty(length: jax.Array | float, alpha: float) -> jax.Array:
    """((5 + length) / 6) ** alpha, the divisor of a log-probability: Wu et al. (2016), equation 14; the end counts."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


# Greedy search and sampling -------------------------------------------------------------------------------------------


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
    step_fn: StepFunction, cache: Cache, limits: Limits, *, bos: int, eos: int, banned: Sequence[int] = ()
) -> Hypotheses:
    """The likeliest token at each step, until the end symbol; the first of equals.

    Args:
      step_fn: tokens [B, 1] and the cache to logits [B, 1, V] of the next token and the cache.
      cache: of the step function.
      limits: of each sentence.
      bos: the token that every walk starts from.
      eos: id of the end symbol.
      banned: ids that are never generated, whatever their logits are.
    """

    def choose(
        vocabulary: Vocabulary, logits_BWV: jax.Array, maxima_BWN: jax.Array, may_end_B: jax.Array, _: jax.Array
    ) -> jax.Array:
        best_B1, _, tokens_B1 = vocabulary.best_tokens(logits_BWV, maxima_BWN, jnp.zeros(logits_BWV.shape[:2]), 1)
        end_B1 = vocabulary.logits_of_end(logits_BWV)
        ends_B1 = (end_B1 > best_B1) | ((end_B1 == best_B1) & (eos < tokens_B1))
        return jnp.where(ends_B1 & may_end_B[:, None], eos, tokens_B1)

    return _walk(step_fn, cache, limits, choose, walks=1, bos=bos, eos=eos, banned=banned)


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

    found = _walk(step_fn, cache, limits, choose, walks=samples, bos=bos, eos=eos, banned=banned)
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
        maxima_BWN = vocabulary.maxima(logits_BWV)
        tokens_BW = choose(vocabulary, logits_BWV, maxima_BWN, position >= limits.least_B, position)
        if limits.prefix_BT is not None:
            forced_B1 = _prefix_at(position, limits)[:, None]
            tokens_BW = jnp.where(forced_B1 < 0, tokens_BW, forced_B1)
        tokens_BW = jnp.where(position >= limits.most_B[:, None], eos, tokens_BW)
        peak_BW, rest_BW = vocabulary.log_normaliser(logits_BWV, maxima_BWN)
        log_probs_BW = vocabulary.logits_of(logits_BWV, tokens_BW) - peak_BW - rest_BW
        # Not a number: the walk ends, rather than go on to its limit without knowing where.
        tokens_BW = jnp.where(state.finished_BW | jnp.isnan(log_probs_BW), eos, tokens_BW)
        return _Walk(
            position + 1,
            jax.lax.dynamic_update_index_in_dim(state.tokens_TBW, tokens_BW, position, axis=0),
            tokens_BW,
            state.finished_BW | (tokens_BW == eos),
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
    end = _run(step, ended, start, limits, length)
    tokens_BWT = end.tokens_TBW.transpose(1, 2, 0)
    lengths_BW = jnp.sum(jnp.cumprod((tokens_BWT != eos).astype(jnp.int32), axis=2), axis=2)
    # One that ended beyond its patience did so in company of a more patient one: alone, it would have been given up.
    in_time_B = jnp.max(lengths_BW, axis=1) < limits.patience_B
    return Hypotheses(tokens_BWT, lengths_BW, end.log_probs_BW, ended(end) & in_time_B)


# Beam search ----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """What a beam search carries from token to token.

    Hypotheses are links: a beam holds its newest token and the beam that it grew from, so that nothing written is ever
    moved, and the tokens are read backwards along the links once, at the end.
    """

    position: jax.Array  # int32 []; tokens that every living beam has
    log_probs_BW: jax.Array  # of the living beams, the likeliest first; -inf for a beam that is none
    last_BW: jax.Array  # their newest token: the next step's input
    tokens_TBW: jax.Array  # the token that each beam wrote at each position
    parents_TBW: jax.Array  # and the beam, of the position before, that it went on from
    scores_BR: jax.Array  # of the complete hypotheses, the best first; -inf where there is none yet
    found_BR: _Found
    greedy_B: jax.Array  # the beam that greedy search is on; -1 where greedy search has come to its end
    done_B: jax.Array  # can no living beam become one of the complete hypotheses any more?
    cache: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Found:
    """Complete hypotheses, in the order of their scores."""

    log_probs: jax.Array  # float32, the end symbol counted
    lengths: jax.Array  # int32, the end symbol not counted
    beams: jax.Array  # int32; the beam that the end symbol follows on


def beam(
    step_fn: StepFunction,
    cache: Cache,
    limits: Limits,
    *,
    beams: int,
    n_best: int,
    alpha: float,
    bos: int,
    eos: int,
    banned: Sequence[int] = (),
) -> Hypotheses:
    """Beam search for the hypotheses of the highest log-probability / `length_penalty`.

    At each step, the end symbol is tried after every living beam, and the `beams` likeliest of all other continuations
    live on; what greedy search would write always does, in the place of the last of them if need be, so that no result
    is worse than greedy's. A sentence is done when no living beam could beat the `n_best` complete ones, were all its
    further tokens certain: a log-probability only falls, and no penalty is larger than that of the longest hypothesis.

    Args:
      step_fn: tokens [B, W] and the cache to logits [B, W, V] of the next token and the cache.
      cache: of the step function.
      limits: of each sentence.
      beams: living hypotheses W a sentence.
      n_best: complete hypotheses R that are kept, the result's W.
      alpha: of the length penalty; 0 is none.
      bos, eos, banned: as for `greedy`.
    """
    batch, length = limits.most_B.shape[0], cache.length
    longest_penalty_B = length_penalty(limits.most_B + 1, alpha)

    def step(state: _Beams) -> _Beams:
        position = state.position
        logits_BWV, inner = step_fn(state.last_BW, state.cache)
        vocabulary = Vocabulary(logits_BWV.shape[-1], eos, banned)
        maxima_BWN = vocabulary.maxima(logits_BWV)
        peak_BW, rest_BW = vocabulary.log_normaliser(logits_BWV, maxima_BWN)
        base_BW = state.log_probs_BW - rest_BW - peak_BW

        may_end_B1 = (position >= limits.least_B)[:, None]
        ended_BW = jnp.where(may_end_B1, base_BW + vocabulary.logits_of_end(logits_BWV), -jnp.inf)
        if limits.prefix_BT is not None:
            forced_B1 = _prefix_at(position, limits)[:, None]
            ended_BW = jnp.where(forced_B1 >= 0, -jnp.inf, ended_BW)
        scores_BR, found_BR = _keep_best(state, _no_nan(ended_BW), alpha)

        log_probs_BW, parents_BW, tokens_BW = vocabulary.best_tokens(logits_BWV, maxima_BWN, base_BW, beams)
        best = _greedy_choice(state, vocabulary, logits_BWV, maxima_BWN, may_end_B1)
        log_probs_BW, parents_BW, tokens_BW, greedy_B = _with_greedy(
            (log_probs_BW, parents_BW, tokens_BW), base_BW, state.greedy_B, *best
        )
        if limits.prefix_BT is not None:
            forced_log_prob_B1 = base_BW[:, :1] + vocabulary.logits_of(logits_BWV[:, :1], forced_B1.clip(0))
            first_1W = (jnp.arange(beams) == 0)[None]
            log_probs_BW = jnp.where(forced_B1 < 0, log_probs_BW, jnp.where(first_1W, forced_log_prob_B1, -jnp.inf))
            parents_BW = jnp.where(forced_B1 < 0, parents_BW, 0)
            tokens_BW = jnp.where(forced_B1 < 0, tokens_BW, forced_B1)
            greedy_B = jnp.where(forced_B1[:, 0] < 0, greedy_B, 0)
        log_probs_BW = _no_nan(jnp.where((position < limits.most_B)[:, None], log_probs_BW, -jnp.inf))

        reach_B = jnp.max(log_probs_BW, axis=1) / longest_penalty_B
        return _Beams(
            position + 1,
            log_probs_BW,
            tokens_BW,
            jax.lax.dynamic_update_index_in_dim(state.tokens_TBW, tokens_BW, position, axis=0),
            jax.lax.dynamic_update_index_in_dim(state.parents_TBW, parents_BW, position, axis=0),
            scores_BR,
            found_BR,
            greedy_B,
            state.done_B | ((scores_BR[:, -1] >= reach_B) & (position < limits.patience_B)),
            cache.reorder(inner, parents_BW),
        )

    start = _Beams(
        jnp.zeros((), jnp.int32),
        jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)[None].repeat(batch, axis=0),
        jnp.full((batch, beams), bos, jnp.int32),
        jnp.zeros((length, batch, beams), jnp.int32),
        jnp.zeros((length, batch, beams), jnp.int32),
        jnp.full((batch, n_best), -jnp.inf),
        _Found(
            jnp.full((batch, n_best), -jnp.inf),
            jnp.zeros((batch, n_best), jnp.int32),
            jnp.zeros((batch, n_best), jnp.int32),
        ),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        cache.start,
    )
    end = _run(step, lambda state: state.done_B, start, limits, length)
    tokens_BRT = _read_back(end, eos)
    return Hypotheses(tokens_BRT, end.found_BR.lengths, end.found_BR.log_probs, end.done_B)


def _greedy_choice(
    state: _Beams, vocabulary: Vocabulary, logits_BWV: jax.Array, maxima_BWN: jax.Array, may_end_B1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What greedy search goes on with on its beam: the logit and the token [B, 1]; -inf where it ends or has ended."""
    is_greedy_BW = jnp.arange(logits_BWV.shape[1])[None] == state.greedy_B[:, None]
    on_its_beam_BW = jnp.where(is_greedy_BW, 0.0, -jnp.inf)
    logit_B1, _, token_B1 = vocabulary.best_tokens(logits_BWV, maxima_BWN, on_its_beam_BW, 1)
    end_B1 = jnp.max(vocabulary.logits_of_end(logits_BWV) + on_its_beam_BW, axis=1, keepdims=True)
    ends_B1 = may_end_B1 & ((end_B1 > logit_B1) | ((end_B1 == logit_B1) & (vocabulary.eos < token_B1)))
    return jnp.where(ends_B1, -jnp.inf, logit_B1), token_B1


def _with_greedy(
    picks: tuple[jax.Array, jax.Array, jax.Array],
    base_BW: jax.Array,
    greedy_B: jax.Array,
    logit_B1: jax.Array,
    token_B1: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The picked log-probabilities, parents and tokens, greedy search's among them, and the beam that it is on now.

    Where it is not one of the picks, it is no likelier than the last of them, and takes its place.
    """
    log_probs_BW, parents_BW, tokens_BW = picks
    last, greedy_B1 = tokens_BW.shape[1] - 1, greedy_B[:, None]
    goes_on_B1 = logit_B1 > -jnp.inf
    is_it_BW = (parents_BW == greedy_B1) & (tokens_BW == token_B1)
    missing_B1 = goes_on_B1 & ~jnp.any(is_it_BW, axis=1, keepdims=True)
    here_BW = missing_B1 & (jnp.arange(last + 1) == last)[None]
    log_prob_B1 = jnp.take_along_axis(base_BW, jnp.maximum(greedy_B1, 0), axis=1) + logit_B1
    beam_B = jnp.where(missing_B1[:, 0], last, jnp.argmax(is_it_BW, axis=1))
    return (
        jnp.where(here_BW, log_prob_B1, log_probs_BW),
        jnp.where(here_BW, greedy_B1, parents_BW),
        jnp.where(here_BW, token_B1, tokens_BW),
        jnp.where(goes_on_B1[:, 0], beam_B, -1).astype(jnp.int32),
    )


def _keep_best(state: _Beams, ended_BW: jax.Array, alpha: float) -> tuple[jax.Array, _Found]:
    """The best of the complete hypotheses and of the living beams with the end symbol; of equals, the older one.

    Those of a sentence that is done stay as they are, however long the others of its batch take.
    """
    ended_BW = jnp.where(state.done_B[:, None], -jnp.inf, ended_BW)
    beams = ended_BW.shape[1]
    new = _Found(
        ended_BW,
        jnp.broadcast_to(state.position, ended_BW.shape),
        jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32), ended_BW.shape),
    )
    scores = jnp.concatenate([state.scores_BR, ended_BW / length_penalty(state.position + 1, alpha)], axis=1)
    scores_BR, chosen_BR = jax.lax.top_k(scores, state.scores_BR.shape[1])
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), state.found_BR, new)
    return scores_BR, jax.tree.map(lambda x: jnp.take_along_axis(x, chosen_BR, axis=1), both)


def _read_back(end: _Beams, eos: int) -> jax.Array:
    """The tokens [B, R, T] of the complete hypotheses, along the links from their last to their first."""
    length = end.tokens_TBW.shape[0]

    def back(beams_BR: jax.Array, at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position, tokens_BW, parents_BW = at
        inside_BR = position < end.found_BR.lengths
        tokens_BR = jnp.where(inside_BR, jnp.take_along_axis(tokens_BW, beams_BR, axis=1), eos)
        return jnp.where(inside_BR, jnp.take_along_axis(parents_BW, beams_BR, axis=1), beams_BR), tokens_BR

    links = (jnp.arange(length), end.tokens_TBW, end.parents_TBW)
    return jax.lax.scan(back, end.found_BR.beams, links, reverse=True)[1].transpose(1, 2, 0)


# Of all searches ------------------------------------------------------------------------------------------------------


def _run(step: Callable[[Any], Any], ended: Callable[[Any], jax.Array], state: Any, limits: Limits, length: int) -> Any:
    """Steps until every sentence has ended or is given up."""

    def goes_on(state: Any) -> jax.Array:
        return (state.position < length) & jnp.any(~ended(state) & (state.position < limits.patience_B))

    return jax.lax.while_loop(goes_on, step, state)


def _prefix_at(position: jax.Array, limits: Limits) -> jax.Array:
    """The token [B] that is forced at a position; -1 where it is free."""
    length = limits.prefix_BT.shape[1]
    forced_B = jax.lax.dynamic_index_in_dim(limits.prefix_BT, jnp.minimum(position, length - 1), axis=1, keepdims=False)
    return jnp.where(position < length, forced_B, -1)


def _no_nan(log_probs: jax.Array) -> jax.Array:
    """What a broken model gives is never a hypothesis."""
    return jnp.where(jnp.isnan(log_probs), -jnp.inf, log_probs)
