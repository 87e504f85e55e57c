"""Greedy search, sampling and what all searches share, on tables of numbers that can be followed by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.searching import (
    EOS,
    IDS,
    NEVER,
    ByPast,
    beam,
    by_last_token,
    by_position,
    greedy,
    limits,
    log_softmax,
    said,
)
from tfm.decoding import search
from tfm.decoding.search import Cache

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
        cache, bounds = past.cache(6), limits([5, 5, 4], prefix=prefix)
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


def test_a_draw_has_its_least_tokens():
    row = np.float32([0, 9, 1, 1])  # which the end is likely to follow at once
    draw = functools.partial(search.sample, samples=8, temperature=1.0, top_k=0, top_p=1.0, **IDS)
    keys = jax.random.split(jax.random.key(0), 1)
    found = jax.jit(lambda: draw(by_last_token([row] * 4), Cache((), 4), limits([3], least=2), keys))()
    assert np.asarray(found.lengths_BW).min() >= 2
