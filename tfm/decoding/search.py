"""Search over `step_fn(tokens, cache) -> (logits, cache)`: it knows no model, and is tested on tables of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

StepFunction = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class Hypotheses(NamedTuple):
    """The result of a search: W translations of each of B sentences, the best first."""

    tokens_BWT: jax.Array  # int32; the end symbol, where there is one, and what follows it are `eos`
    lengths_BW: jax.Array  # int32; tokens before the end symbol
    log_probs_BW: jax.Array  # float32; log-probability of the tokens and, where it was reached, the end symbol


class _GreedyState(NamedTuple):
    """What a greedy search carries from token to token."""

    position: jax.Array  # int32 []; tokens written so far
    tokens_BT: jax.Array  # what was written
    last_B: jax.Array  # the newest token of each sentence: the next step's input
    finished_B: jax.Array  # has the end symbol been written, or the limit been reached?
    log_probs_B: jax.Array
    cache: Any


def greedy(
    step_fn: StepFunction, cache: Any, start_B: jax.Array, limits_B: jax.Array, *, length: int, eos: int
) -> Hypotheses:
    """The likeliest token at each step, until the end symbol.

    Args:
      step_fn: tokens [B, 1] and the cache to logits [B, 1, V] of the next token and the cache. A token that must not be
        generated has -inf.
      cache: of the step function, for no token yet.
      start_B: the token that every search starts from.
      limits_B: most tokens that a sentence may have, the end symbol not counted; at most `length`.
      length: size T of the result.
      eos: id of the end symbol.
    """
    batch = start_B.shape[0]

    def unfinished(state: _GreedyState) -> jax.Array:
        return (state.position < length) & ~jnp.all(state.finished_B)

    def step(state: _GreedyState) -> _GreedyState:
        logits_B1V, cache = step_fn(state.last_B[:, None], state.cache)
        token_B, log_prob_B = _best(logits_B1V[:, 0], eos)
        token_B = jnp.where(state.finished_B, eos, token_B)
        log_probs_B = state.log_probs_B + jnp.where(state.finished_B, 0.0, log_prob_B)
        position = state.position + 1
        return _GreedyState(
            position,
            jax.lax.dynamic_update_slice_in_dim(state.tokens_BT, token_B[:, None], state.position, axis=1),
            token_B,
            state.finished_B | (token_B == eos) | (position >= limits_B),
            log_probs_B,
            cache,
        )

    start = _GreedyState(
        jnp.zeros((), jnp.int32),
        jnp.full((batch, length), eos, jnp.int32),
        start_B.astype(jnp.int32),
        limits_B <= 0,
        jnp.zeros((batch,), jnp.float32),
        cache,
    )
    end = jax.lax.while_loop(unfinished, step, start)
    lengths_B = jnp.sum(jnp.cumprod((end.tokens_BT != eos).astype(jnp.int32), axis=1), axis=1)
    return Hypotheses(end.tokens_BT[:, None], lengths_B[:, None], end.log_probs_B[:, None])


def _best(logits_BV: jax.Array, eos: int) -> tuple[jax.Array, jax.Array]:
    """The likeliest token of each row, the first of equals, and its log-probability.

    Two plain reductions: on a CPU they cost a small part of what `argmax`, which carries pairs along, does.
    """
    best_B = jnp.max(logits_BV, axis=-1)
    ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None]
    token_B = jnp.min(jnp.where(logits_BV == best_B[:, None], ids_V, logits_BV.shape[-1]), axis=-1)
    log_prob_B = -jnp.log(jnp.sum(jnp.exp(logits_BV - best_B[:, None]), axis=-1))
    # A row of NaN equals nothing: end it, rather than look up a token that isn't there.
    return jnp.where(token_B < logits_BV.shape[-1], token_B, eos), log_prob_B
