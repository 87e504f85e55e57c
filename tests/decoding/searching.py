"""Tables of numbers in the place of a model, and searches on them."""

import jax
import jax.numpy as jnp
import numpy as np

from tfm.decoding import search
from tfm.decoding.beam import beam_search
from tfm.decoding.search import Cache, Limits

BOS, EOS = 0, 1
IDS = {"bos": BOS, "eos": EOS}
NEVER = -np.inf


def by_last_token(table):
    """A step whose logits depend on the token before alone: row `token` of the table."""
    table = jnp.asarray(table, jnp.float32)
    return lambda tokens_BW, cache: (table[tokens_BW], cache)


def by_position(table):
    """A step whose logits depend on sentence and position alone; the cache is the position."""
    table = jnp.asarray(table, jnp.float32)

    def step(tokens_BW, position):
        logits = jax.lax.dynamic_index_in_dim(table, position, axis=1)
        return jnp.broadcast_to(logits, (*tokens_BW.shape, table.shape[-1])), position + 1

    return step


class ByPast:
    """Logits that depend on all the tokens so far: table[sentence, position, state], a state of seven made of them.

    The cache is the position and all that each beam has said: of a single one, until others go on from it.
    """

    STATES = 7

    def __init__(self, tables):
        self.tables = np.asarray(tables, np.float32)  # [sentences, positions, STATES, V]

    def cache(self, length: int) -> Cache:
        start = (jnp.zeros((), jnp.int32), jnp.zeros((len(self.tables), 1, length)))

        def reorder(cache, parents):
            position, said = cache
            return position, jnp.take_along_axis(said, parents[..., None], axis=1)

        return Cache(start, length, reorder)

    def step(self, tokens, cache):
        position, said = cache
        said = jax.lax.dynamic_update_index_in_dim(said, tokens.astype(jnp.float32), position, axis=2)
        states = self.state(said, position)
        tables = jax.lax.dynamic_index_in_dim(jnp.asarray(self.tables), position, axis=1, keepdims=False)
        return jnp.take_along_axis(tables, states[..., None], axis=1), (position + 1, said)

    def state(self, said, position):
        """Out of all that was said, so that a cache of another beam's past would show."""
        weights = jnp.where(jnp.arange(said.shape[2]) <= position, jnp.arange(said.shape[2]) + 2, 0)
        return jnp.sum(said * weights[None, None], axis=2).astype(jnp.int32) % self.STATES

    def log_prob(self, sentence: int, tokens: tuple[int, ...]) -> float:
        """Of the tokens and the end symbol, in float64."""
        said, total = [BOS], 0.0
        for position, token in enumerate((*tokens, EOS)):
            state = sum(t * (i + 2) for i, t in enumerate(said)) % self.STATES
            total += log_softmax(self.tables[sentence, position, state])[token]
            said.append(token)
        return total


def greedy(step, cache, bounds, **settings):
    """Compiled, like every search here, and what it finds in NumPy's arrays: op by op all would take far longer."""
    return jax.device_get(jax.jit(lambda: search.greedy(step, cache, bounds, **settings, **IDS))())


def beam(step, cache, bounds, *, beams, n_best=1, alpha=0.6):
    settings = {"beams": beams, "n_best": n_best, "alpha": alpha}
    # Hundreds of beams take longer to search than to compile, and are worth the optimisation that tests do without.
    options = {"xla_backend_optimization_level": 1} if beams > 100 else None
    search_all = jax.jit(lambda: beam_search(step, cache, bounds, **settings, **IDS), compiler_options=options)
    return jax.device_get(search_all())


def log_softmax(row) -> np.ndarray:
    row = np.asarray(row, np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def limits(most, least=0, prefix=None, patience=1000) -> Limits:
    most = jnp.asarray(most, jnp.int32)
    prefix = None if prefix is None else jnp.asarray(prefix, jnp.int32)
    least = jnp.minimum(jnp.broadcast_to(jnp.asarray(least, jnp.int32), most.shape), most)
    return Limits(least, most, patience, prefix)


def said(found, row: int, rank: int = 0) -> list[int]:
    return found.tokens_BWT[row, rank, : found.lengths_BW[row, rank]].tolist()
