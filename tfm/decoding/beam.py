"""Beam search over `step_fn(tokens, cache) -> (logits, cache)`: ends when nothing better can come, and no sooner.

Dimension R: complete hypotheses that are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tfm.decoding.search import Cache, Hypotheses, Limits, StepFunction, prefix_at, run
from tfm.decoding.translation import length_penalty
from tfm.decoding.vocabulary import Vocabulary


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


def beam_search(
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
      step_fn: tokens [B, W] and the cache to logits [B, W, V] of the next token and the cache; at first, of one beam.
      cache: of the step function; what it remembers of the first step's one beam, `reorder` gives to all.
      limits: of each sentence.
      beams: living hypotheses W a sentence.
      n_best: complete hypotheses R that are kept, the result's W.
      alpha: of the length penalty; 0 is none.
      bos, eos, banned: as for `search.greedy`.
    """
    batch, length = limits.most_B.shape[0], cache.length
    longest_penalty_B = length_penalty(jnp.asarray(limits.most_B + 1, jnp.float32), alpha)

    def step(state: _Beams) -> _Beams:
        position = state.position
        logits_BWV, inner = step_fn(state.last_BW, state.cache)
        vocabulary = Vocabulary(logits_BWV.shape[-1], eos, banned)
        maxima_BWG = vocabulary.maxima(logits_BWV)
        peak_BW, rest_BW = vocabulary.log_normaliser(logits_BWV, maxima_BWG)
        base_BW = state.log_probs_BW - rest_BW - peak_BW

        may_end_B1 = (position >= limits.least_B)[:, None]
        ended_BW = jnp.where(may_end_B1, base_BW + vocabulary.logits_of_end(logits_BWV), -jnp.inf)
        if limits.prefix_BT is not None:
            forced_B1 = prefix_at(position, limits)[:, None]
            ended_BW = jnp.where(forced_B1 >= 0, -jnp.inf, ended_BW)
        scores_BR, found_BR = _keep_best(state, _no_nan(ended_BW), alpha)

        log_probs_BW, parents_BW, tokens_BW = vocabulary.best_tokens(logits_BWV, maxima_BWG, base_BW, beams)
        best = _greedy_choice(state, vocabulary, logits_BWV, maxima_BWG, may_end_B1)
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
        jnp.zeros((batch, 1)),
        jnp.full((batch, 1), bos, jnp.int32),
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
    # The first step is one of its own, of the one beam that all others go on from.
    end = run(step, lambda state: state.done_B, step(start), limits, length)
    tokens_BRT = _read_back(end, eos)
    return Hypotheses(tokens_BRT, end.found_BR.lengths, end.found_BR.log_probs, end.done_B)


def _greedy_choice(
    state: _Beams, vocabulary: Vocabulary, logits_BWV: jax.Array, maxima_BWG: jax.Array, may_end_B1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What greedy search goes on with on its beam: the logit and the token [B, 1]; -inf where it ends or has ended."""
    is_greedy_BW = jnp.arange(logits_BWV.shape[1])[None] == state.greedy_B[:, None]
    on_its_beam_BW = jnp.where(is_greedy_BW, 0.0, -jnp.inf)
    logit_B1, _, token_B1 = vocabulary.best_tokens(logits_BWV, maxima_BWG, on_its_beam_BW, 1)
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
    penalty = length_penalty(jnp.asarray(state.position + 1, jnp.float32), alpha)
    scores = jnp.concatenate([state.scores_BR, ended_BW / penalty], axis=1)
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


def _no_nan(log_probs: jax.Array) -> jax.Array:
    """What a broken model gives is never a hypothesis."""
    return jnp.where(jnp.isnan(log_probs), -jnp.inf, log_probs)
