"""Searches on tables of numbers, which can be followed by hand or enumerated to the last hypothesis."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.decoding import search
from tfm.decoding.beam import beam_search
from tfm.decoding.search import Cache, Limits
from tfm.decoding.translation import length_penalty

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

    The cache is the position and all that each beam has said.
    """

    STATES = 7

    def __init__(self, tables):
        self.tables = np.asarray(tables, np.float32)  # [sentences, positions, STATES, V]

    def cache(self, beams: int, length: int) -> Cache:
        start = (jnp.zeros((), jnp.int32), jnp.zeros((len(self.tables), beams, length)))

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


# Greedy search --------------------------------------------------------------------------------------------------------


def test_a_path_that_can_be_followed_by_hand():
    #         0    1    2    3    4
    table = [
        [0.0, 0.0, 2.0, 0.0, 0.0],  # start -> 2
        [0.0, 0.0, 0.0, 0.0, 9.0],  # after the end symbol a finished row would go on to 4, were it asked
        [1.0, 0.0, 0.0, 5.0, 4.9],  # 2 -> 3
        [1.0, 2.0, 0.0, 0.0, 3.0],  # 3 -> 4
        [0.5, 2.5, 0.0, 0.0, 2.0],  # 4 -> end
    ]
    found = greedy(by_last_token(table), Cache((), 7), limits([6, 6]))
    np.testing.assert_array_equal(found.tokens_BWT[:, 0], [[2, 3, 4, 1, 1, 1, 1]] * 2)
    np.testing.assert_array_equal(found.lengths_BW, [[3], [3]])
    path = [(0, 2), (2, 3), (3, 4), (4, EOS)]
    expected = sum(log_softmax(table[last])[token] for last, token in path)
    np.testing.assert_allclose(found.log_probs_BW[:, 0], [expected] * 2, rtol=1e-6)


def test_at_its_limit_a_sentence_is_ended_and_pays_for_its_end():
    """Limits of 0 to 4 tokens where nothing but 2 is said."""
    row = [0.0, 1.0, 3.0]
    most = np.array([0, 1, 3, 4])
    found = greedy(by_last_token([row] * 3), Cache((), 5), limits(most))
    np.testing.assert_array_equal(found.lengths_BW[:, 0], most)
    for tokens, limit in zip(found.tokens_BWT[:, 0], most, strict=True):
        np.testing.assert_array_equal(tokens, [2] * limit + [EOS] * (5 - limit))
    expected = most * log_softmax(row)[2] + log_softmax(row)[EOS]
    np.testing.assert_allclose(found.log_probs_BW[:, 0], expected, rtol=1e-6)


def test_sentences_end_at_different_times_and_a_finished_one_stays_as_it_is():
    generator = np.random.default_rng(0)
    table = generator.normal(size=(5, 10, 12))
    ends = [0, 2, 5, 8, 9]
    for row, end in enumerate(ends):
        table[row, :, EOS] = -9
        table[row, end, EOS] = 9
    found = greedy(by_position(table), Cache(jnp.int32(0), 10), limits([9] * 5))
    np.testing.assert_array_equal(found.lengths_BW[:, 0], ends)
    for row, end in enumerate(ends):
        best = table[row].argmax(-1)
        np.testing.assert_array_equal(found.tokens_BWT[row, 0], [*best[:end], *[EOS] * (10 - end)])
        expected = sum(log_softmax(table[row, t])[best[t]] for t in range(end + 1))
        assert float(found.log_probs_BW[row, 0]) == pytest.approx(expected, rel=1e-5)


def test_a_token_that_is_ruled_out_is_never_said_and_takes_no_probability():
    generator = np.random.default_rng(1)
    table = generator.normal(size=(4, 7, 300))  # more than two blocks of the vocabulary
    banned = [0, 3, 7, 150, 299]
    table[:, :, banned] = NEVER
    table[0, 0, 4:] = NEVER  # all but 1 and 2
    found = greedy(by_position(table), Cache(jnp.int32(0), 7), limits([6] * 4))
    assert not np.isin(found.tokens_BWT, banned).any()
    assert int(found.tokens_BWT[0, 0, 0]) in (1, 2)
    for row in range(4):
        tokens = [*said(found, row), EOS]
        expected = sum(log_softmax(table[row, t])[token] for t, token in enumerate(tokens))
        assert tokens[:-1] == table[row, : len(tokens) - 1].argmax(-1).tolist()
        assert float(found.log_probs_BW[row, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("row", "expected"), [([0, 0, 7, 7, 7], 2), ([7, 7, 7, 0, 0], 0), ([0, 7, 7, 0, 0], EOS)])
def test_of_equals_the_first_is_taken(row, expected):
    found = greedy(by_last_token([[*map(float, row)]] * 5), Cache((), 4), limits([3]))
    assert int(found.tokens_BWT[0, 0, 0]) == expected


def test_logits_of_any_size_give_finite_log_probabilities():
    for decode in (greedy, functools.partial(beam, beams=2)):
        found = decode(by_last_token([[0.0, -3e4, 3e4, 2.9e4]] * 4), Cache((), 3), limits([2]))
        assert float(found.log_probs_BW[0, 0]) == pytest.approx(-6e4)  # two times nothing, and a forced end
        assert said(found, 0) == [2, 2]


def test_not_a_number_ends_the_sentence():
    """As a broken model gives: no token is the likeliest, and none that doesn't exist may be said."""
    table = np.zeros((2, 4, 4))
    table[:, :, 2] = 5
    table[0, 1, 3] = np.nan
    found = greedy(by_position(table), Cache(jnp.int32(0), 4), limits([3, 3]))
    np.testing.assert_array_equal(found.tokens_BWT[:, 0], [[2, 1, 1, 1], [2, 2, 2, 1]])
    assert np.isnan(found.log_probs_BW[0, 0]) and np.isfinite(found.log_probs_BW[1, 0])
    found = beam(by_position(table), Cache(jnp.int32(0), 4), limits([3, 3]), beams=3, n_best=1, alpha=0.0)
    assert said(found, 1) == [] and not np.isnan(found.log_probs_BW).any()  # ending at once is likelier than three more


@pytest.mark.parametrize("prefix", [None, [[-1, -1], [2, -1], [2, 3], [-1, -1], [4, 5]]])
def test_without_scores_the_same_is_said(prefix):
    table = np.random.default_rng(2).normal(size=(5, 10, 12))
    table[0, :4, EOS], table[0, 4, EOS] = NEVER, 9  # ends at its limit by itself
    table[1, 1:, 2:] = table[1, 1:, 0, None] = NEVER  # has nothing but an end to go on with
    table[2, :, EOS] = NEVER  # is made to end
    table[3, 3, 7] = np.nan
    arguments = by_position(table), Cache(jnp.int32(0), 10), limits([4, 9, 9, 9, 0], [1, 1, 0, 2, 0], prefix, 7)
    scored, found = greedy(*arguments), greedy(*arguments, scores=False)
    for mine, theirs in zip(found, scored, strict=True):
        if mine is not found.log_probs_BW:
            np.testing.assert_array_equal(mine, theirs)
    assert found.lengths_BW[:, 0].tolist()[:2] + found.lengths_BW[4].tolist() == [4, 1, 0]
    assert found.is_whole_B.tolist() == [True, True, False, True, True]
    np.testing.assert_array_equal(np.isnan(found.log_probs_BW), np.isnan(scored.log_probs_BW))
    assert not found.log_probs_BW[[0, 1, 4]].any()


@pytest.mark.parametrize("scores", [True, False])
def test_only_scores_need_a_step_for_an_end_that_is_forced(scores):
    calls, step = [], by_last_token([[0.0, 1.0, 3.0]] * 3)

    def counted(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return step(tokens, cache)

    found = greedy(counted, Cache((), 9), limits([0, 2, 3]), scores=scores)
    jax.effects_barrier()
    assert found.lengths_BW[:, 0].tolist() == [0, 2, 3]
    assert len(calls) == 3 + scores


@pytest.mark.parametrize("beams", [1, 3])
def test_the_search_stops_as_soon_as_all_sentences_have_ended(beams):
    calls = []

    def step(tokens_BW, cache):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((2, beams, 3)).at[:, :, EOS].set(9.0), cache

    if beams == 1:
        found = greedy(step, Cache((), 51), limits([50, 50]))
    else:
        found = beam(step, Cache((), 51), limits([50, 50]), beams=beams, n_best=1, alpha=0.6)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(calls) == 1


def test_a_sentence_has_its_least_tokens_and_pays_what_the_model_asks():
    row = [0.0, 6.0, 3.0, 2.0]
    for decode in (greedy, functools.partial(beam, beams=3, alpha=0.0)):
        found = decode(by_last_token([row] * 4), Cache((), 6), limits([5, 5, 1], least=[0, 3, 3]))
        assert [said(found, i) for i in range(3)] == [[], [2, 2, 2], [2]]
        expected = log_softmax(row)[2] * np.array([0, 3, 1]) + log_softmax(row)[EOS]
        np.testing.assert_allclose(found.log_probs_BW[:, 0], expected, rtol=1e-5)


def test_a_forced_prefix_is_said_and_paid_for_and_leaves_the_rest_free():
    generator = np.random.default_rng(5)
    past = ByPast(generator.normal(size=(3, 6, 7, 6)))
    prefix = [[4, 2, -1, -1], [-1] * 4, [3, 3, 5, 2]]
    for beams in (1, 4):
        cache, bounds = past.cache(beams, 6), limits([5, 5, 4], prefix=prefix)
        if beams == 1:
            found = greedy(past.step, cache, bounds)
            free = greedy(past.step, cache, limits([5, 5, 4]))
        else:
            settings = {"beams": beams, "n_best": 3}
            found = beam(past.step, cache, bounds, **settings)
            free = beam(past.step, cache, limits([5, 5, 4]), **settings)
        assert said(found, 0)[:2] == [4, 2] and said(found, 2) == [3, 3, 5, 2]
        for part, other in zip(found, free, strict=True):
            np.testing.assert_array_equal(part[1], other[1])  # what has no prefix is searched as ever
        for row, rank in itertools.product(range(3), range(found.lengths_BW.shape[1])):
            if np.isfinite(found.log_probs_BW[row, rank]):
                expected = past.log_prob(row, said(found, row, rank))
                assert float(found.log_probs_BW[row, rank]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("decode", [greedy, functools.partial(beam, beams=2, alpha=0.0)], ids=["greedy", "beam"])
def test_a_sentence_that_goes_on_for_too_long_is_given_up_and_the_others_do_not_wait(decode):
    """By its own patience alone: that of a batch-mate, which keeps the search going, changes nothing."""
    generator = np.random.default_rng(3)
    table = generator.normal(size=(4, 12, 9))
    table[:, :, EOS] = -9
    for row, end in enumerate((3, 9, 5, 5)):
        table[row, end, EOS] = 30
    patience = jnp.array([5, 8, 5, 6])  # the third one would end while the second still has patience
    found = decode(by_position(table), Cache(jnp.int32(0), 8), limits([11] * 4, patience=patience))
    assert found.is_whole_B.tolist() == [True, False, False, True]
    whole = decode(by_position(table), Cache(jnp.int32(0), 12), limits([11] * 4))
    assert whole.is_whole_B.all() and whole.lengths_BW[:, 0].tolist() == [3, 9, 5, 5]
    for row in (0, 3):
        assert said(found, row) == said(whole, row)
        assert found.log_probs_BW[row, 0] == whole.log_probs_BW[row, 0]


# Beam search ----------------------------------------------------------------------------------------------------------

#            0.6 ┌─ b 0.4 ─ end        greedy: a b, since a is likelier than c:  0.6 * 0.4 = 0.24
#     start ─ a ─┼─ d 0.3 ─ end
#       │        └─ e 0.3 ─ end        the best: c f, and nothing else after c:  0.4 * 1.0 = 0.40
#       └ 0.4 c ─── f 1.0 ─ end
A, B, C, D, E, F = range(2, 8)
LATTICE = {
    BOS: {A: 0.6, C: 0.4},
    A: {B: 0.4, D: 0.3, E: 0.3},
    C: {F: 1.0},
    **{last: {EOS: 1.0} for last in (B, D, E, F)},
}


def lattice():
    table = np.full((8, 8), NEVER)
    table[EOS, EOS] = 0.0
    for last, ways in LATTICE.items():
        for token, probability in ways.items():
            table[last, token] = np.log(probability)
    return by_last_token(table)


def test_a_lattice_whose_greedy_path_is_not_its_best():
    found = greedy(lattice(), Cache((), 6), limits([5]))
    assert said(found, 0) == [A, B] and float(found.log_probs_BW[0, 0]) == pytest.approx(np.log(0.24))
    found = beam(lattice(), Cache((), 6), limits([5]), beams=2, n_best=2, alpha=0.6)
    assert [said(found, 0, rank) for rank in range(2)] == [[C, F], [A, B]]
    np.testing.assert_allclose(found.log_probs_BW[0], np.log([0.4, 0.24]), rtol=1e-5)
    found = beam(lattice(), Cache((), 6), limits([5]), beams=5, n_best=5, alpha=0.0)
    assert [said(found, 0, rank) for rank in range(4)] == [[C, F], [A, B], [A, D], [A, E]]
    assert np.isneginf(found.log_probs_BW[0, 4]) and said(found, 0, 4) == []  # there are only four


def test_the_length_penalty_is_the_paper_s():
    for length, alpha in itertools.product((1, 7, 40), (0.0, 0.6, 1.0)):
        assert float(length_penalty(length, alpha)) == pytest.approx((5 + length) ** alpha / (5 + 1) ** alpha)


def test_a_length_penalty_prefers_the_longer_of_two_that_are_equally_likely():
    """[2, end] and [3, 4, end] have the same probability."""
    table = np.full((5, 5), NEVER)
    for last, token, probability in ((BOS, 2, 0.5), (BOS, 3, 0.5), (2, EOS, 1), (3, 4, 1), (4, EOS, 1), (EOS, EOS, 1)):
        table[last, token] = np.log(probability)
    for alpha, expected in ((0.0, [2]), (0.6, [3, 4])):
        found = beam(by_last_token(table), Cache((), 5), limits([4]), beams=2, n_best=1, alpha=alpha)
        assert said(found, 0) == expected


VOCAB, LONGEST = 5, 4


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_no_beam_search_finds_less_than_greedy_search(beams):
    """On tables surer of later tokens than of the first: losing sight of greedy's path costs something on a few."""
    surer = np.linspace(0.3, 5, 10)[None, :, None, None]
    past = ByPast(np.random.default_rng(5).normal(size=(400, 10, ByPast.STATES, 20)) * surer)
    cache, bounds = past.cache(1, 10), limits([9] * 400, least=[0, 3] * 200)
    by_greedy = greedy(past.step, cache, bounds)
    found = beam(past.step, past.cache(beams, 10), bounds, beams=beams, alpha=0.6)
    scores, least = (of.log_probs_BW[:, 0] / length_penalty(of.lengths_BW[:, 0] + 1, 0.6) for of in (found, by_greedy))
    assert np.all(scores >= least - 1e-5)
    assert np.sum(scores > least + 1e-3) > 100


def random_tables(count: int, seed: int, vocab: int = VOCAB, longest: int = LONGEST) -> ByPast:
    """Half of them of few different numbers, so that the end symbol ties with others, and whole hypotheses do."""
    generator = np.random.default_rng(seed)
    tables = generator.normal(size=(count, longest + 1, 7, vocab)) * 2
    tables[::2] = np.round(tables[::2])
    return ByPast(tables)


def all_hypotheses(past: ByPast, sentence: int, most: int, least: int, alpha: float) -> list[tuple[float, tuple]]:
    """(score, tokens) of every hypothesis there is, the best first."""
    others = [token for token in range(past.tables.shape[-1]) if token != EOS]
    found = []
    for length in range(least, most + 1):
        for tokens in itertools.product(others, repeat=length):
            found.append((past.log_prob(sentence, tokens) / float(length_penalty(length + 1, alpha)), tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize(("alpha", "n_best", "seed"), [(0.0, 1, 0), (0.6, 4, 1), (1.0, 9, 2)])
def test_at_full_width_the_n_best_are_the_true_ones(alpha, n_best, seed):
    """Every hypothesis of 67 tables each, enumerated; with ties, early stops, and lengths that must be kept to."""
    past = random_tables(67, seed)
    generator = np.random.default_rng(seed)
    most = generator.integers(1, LONGEST + 1, 67)
    least = generator.integers(0, 2, 67)
    width = (VOCAB - 1) ** LONGEST
    cache = past.cache(width, LONGEST + 1)
    found = beam(past.step, cache, limits(most, least), beams=width, n_best=n_best, alpha=alpha)
    for row in range(67):
        truth = all_hypotheses(past, row, most[row], least[row], alpha)[:n_best]
        hypotheses = [tuple(said(found, row, rank)) for rank in range(len(truth))]
        assert len(set(hypotheses)) == len(truth)
        log_probs = [past.log_prob(row, tokens) for tokens in hypotheses]
        np.testing.assert_allclose(found.log_probs_BW[row, : len(truth)], log_probs, rtol=1e-4, atol=1e-4)
        scores = [p / float(length_penalty(len(h) + 1, alpha)) for p, h in zip(log_probs, hypotheses, strict=True)]
        np.testing.assert_allclose(scores, [score for score, _ in truth], rtol=1e-4, atol=1e-4)
        assert np.all(np.isneginf(found.log_probs_BW[row, len(truth) :]))


def narrow_beam(past: ByPast, sentence: int, most: int, beams: int, n_best: int, alpha: float) -> list[float]:
    """Scores by the rules of `beam`, to the very limit of length, without stopping early; in NumPy."""
    living, complete = [(0.0, (BOS,))], []
    for position in range(most + 1):
        candidates = []
        for log_prob, tokens in living:
            state = sum(t * (i + 2) for i, t in enumerate(tokens)) % past.STATES
            log_probs = log_prob + log_softmax(past.tables[sentence, position, state])
            complete.append(log_probs[EOS] / float(length_penalty(position + 1, alpha)))
            candidates += [(log_probs[t], (*tokens, t)) for t in range(past.tables.shape[-1]) if t != EOS]
        living = sorted(candidates, reverse=True)[:beams]
    return sorted(complete, reverse=True)[:n_best]


@pytest.mark.parametrize(("beams", "n_best", "alpha"), [(2, 1, 0.6), (3, 3, 1.0), (4, 2, 0.0)])
def test_stopping_early_changes_nothing(beams, n_best, alpha):
    """Tables without ties, which NumPy in float64 would break in another way."""
    generator = np.random.default_rng(beams)
    past = ByPast(generator.normal(size=(100, 9, 7, 6)) * 2)
    most = generator.integers(0, 9, 100)
    found = beam(past.step, past.cache(beams, 9), limits(most), beams=beams, n_best=n_best, alpha=alpha)
    for row in range(100):
        expected = narrow_beam(past, row, most[row], beams, n_best, alpha)
        scores = np.asarray(found.log_probs_BW[row]) / length_penalty(found.lengths_BW[row] + 1, alpha)
        np.testing.assert_allclose(scores[: len(expected)], expected, rtol=1e-4, atol=1e-4)


# Sampling -------------------------------------------------------------------------------------------------------------


def drawn(row, *, samples: int = 4000, most: int = 1, sentences: int = 1, seed: int = 0, **settings):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    keys = jax.random.split(jax.random.key(seed), sentences)
    step = by_last_token(np.broadcast_to(np.asarray(row, np.float32), (len(row), len(row))))
    cache = Cache((), most + 1)
    bounds = limits([most] * sentences)
    found = jax.jit(lambda: search.sample(step, cache, bounds, keys, samples=samples, **settings, **IDS))()
    return jax.device_get(found)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [0.1, 0.2, 0.4, 0.25, 0.05]),
        ({"temperature": 0.5}, [0.01, 0.04, 0.16, 0.0625, 0.0025]),
        ({"top_k": 2}, [0, 0, 0.4, 0.25, 0]),
        ({"top_p": 0.6}, [0, 0, 0.4, 0.25, 0]),
        ({"top_p": 0.3}, [0, 0, 0.4, 0, 0]),
        ({"top_k": 4, "top_p": 0.9}, [0.1, 0.2, 0.4, 0.25, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings, weights):
    probabilities = np.array([0.1, 0.2, 0.4, 0.25, 0.05])
    found = drawn(np.log(probabilities), **settings)
    counts = np.bincount(np.asarray(found.tokens_BWT[0, :, 0]), minlength=5)
    expected = np.array(weights) / sum(weights)
    assert np.all(counts[expected == 0] == 0)
    deviation = np.sqrt(4000 * expected * (1 - expected))
    assert np.all(np.abs(counts - 4000 * expected) <= 4.5 * deviation + 1e-9)
    ended = np.asarray(found.lengths_BW[0]) == 0
    log_probs = np.log(probabilities)
    first = np.asarray(found.tokens_BWT[0, :, 0])
    np.testing.assert_allclose(  # the model's own, whatever they were drawn from
        found.log_probs_BW[0], log_probs[first] + np.where(ended, 0, log_probs[EOS]), rtol=1e-4
    )
    assert np.all(np.diff(found.log_probs_BW[0]) <= 0)


def test_draws_are_the_same_again_and_depend_on_nothing_but_the_key():
    row = np.log(np.full(6, 1 / 6))
    found = drawn(row, samples=5, most=7, sentences=4)
    again = drawn(row, samples=5, most=7, sentences=4)
    for part, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(part, other)
    keys = jax.random.split(jax.random.key(0), 4)[2:3]
    step = by_last_token(np.broadcast_to(np.asarray(row, np.float32), (6, 6)))
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **IDS}
    alone = jax.jit(lambda: search.sample(step, Cache((), 8), limits([7]), keys, samples=5, **settings))()
    np.testing.assert_array_equal(alone.tokens_BWT[0], found.tokens_BWT[2])
    texts = {tuple(said(found, i, j)) for i in range(4) for j in range(5)}
    assert len(texts) > 15
    other_seed = drawn(row, samples=5, most=7, sentences=4, seed=1)
    assert not np.array_equal(other_seed.tokens_BWT, found.tokens_BWT)
