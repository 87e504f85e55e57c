"""Greedy search on tables of numbers that can be followed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.decoding.search import greedy

EOS = 1
NEVER = -np.inf


def by_last_token(table):
    """A step whose logits depend on the token before alone: row `token` of the table."""
    table = jnp.asarray(table, jnp.float32)
    return lambda tokens_BW, cache: (table[tokens_BW], cache)


def by_position(table):
    """A step whose logits depend on sentence and position alone; the cache is the position."""
    table = jnp.asarray(table, jnp.float32)

    def step(tokens_BW, position):
        return jax.lax.dynamic_slice_in_dim(table, position, 1, axis=1), position + 1

    return step, jnp.zeros((), jnp.int32)


def log_softmax(row) -> np.ndarray:
    row = np.asarray(row, np.float64)
    return row - np.log(np.exp(row).sum())


def test_a_path_that_can_be_followed_by_hand():
    #         0    1    2    3    4
    table = [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 9.0],  # after the end symbol a finished row would go on to 4, were it asked
        [1.0, 0.0, 0.0, 5.0, 4.9],  # 2 -> 3
        [1.0, 2.0, 0.0, 0.0, 3.0],  # 3 -> 4
        [0.5, 2.5, 0.0, 0.0, 2.0],  # 4 -> end
    ]
    found = greedy(by_last_token(table), (), jnp.array([2, 4, 3]), jnp.array([6, 6, 6]), length=6, eos=EOS)
    np.testing.assert_array_equal(found.tokens_BWT[:, 0], [[3, 4, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [4, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(found.lengths_BW, [[2], [0], [1]])
    end = log_softmax(table[4])[1]
    expected = [log_softmax(table[2])[3] + log_softmax(table[3])[4] + end, end, log_softmax(table[3])[4] + end]
    np.testing.assert_allclose(found.log_probs_BW[:, 0], expected, rtol=1e-6)


def test_the_limit_ends_a_sentence_without_an_end_symbol():
    """Limits of 0 to 4 tokens where nothing but 2 is said; no end symbol is counted or has a probability."""
    row = [0.0, 1.0, 3.0]
    limits = jnp.array([0, 1, 3, 4])
    found = greedy(by_last_token([row] * 3), (), jnp.zeros(4, jnp.int32), limits, length=4, eos=EOS)
    np.testing.assert_array_equal(found.lengths_BW[:, 0], limits)
    for tokens, limit in zip(found.tokens_BWT[:, 0], limits, strict=True):
        np.testing.assert_array_equal(tokens, [2] * int(limit) + [EOS] * (4 - int(limit)))
    np.testing.assert_allclose(found.log_probs_BW[:, 0], np.asarray(limits) * log_softmax(row)[2], rtol=1e-6)


def test_an_end_symbol_at_the_limit_is_not_waited_for():
    """After `limit` tokens the sentence is over, whether the next token would have been the end or not."""
    table = np.zeros((2, 3, 3))
    table[:, 0, 2] = table[:, 1, EOS] = table[:, 2, 2] = 5
    step, cache = by_position(table)
    found = greedy(step, cache, jnp.zeros(2, jnp.int32), jnp.array([1, 2]), length=3, eos=EOS)
    np.testing.assert_array_equal(found.tokens_BWT[:, 0], [[2, 1, 1], [2, 1, 1]])
    first, end = log_softmax(table[0, 0])[2], log_softmax(table[0, 1])[EOS]
    np.testing.assert_allclose(found.log_probs_BW[:, 0], [first, first + end], rtol=1e-6)


def test_a_finished_sentence_stays_finished_while_others_go_on():
    generator = np.random.default_rng(0)
    table = generator.normal(size=(5, 9, 12))
    ends = [0, 2, 5, 8, 9]
    for row, end in enumerate(ends):
        table[row, :, EOS] = -9
        if end < 9:
            table[row, end, EOS] = 9
    step, cache = by_position(table)
    found = greedy(step, cache, jnp.zeros(5, jnp.int32), jnp.full(5, 9), length=9, eos=EOS)
    np.testing.assert_array_equal(found.lengths_BW[:, 0], ends)
    for row, end in enumerate(ends):
        best = table[row].argmax(-1)
        np.testing.assert_array_equal(found.tokens_BWT[row, 0], [*best[:end], *[EOS] * (9 - end)])
        said = min(end + 1, 9)
        expected = sum(log_softmax(table[row, t])[best[t]] for t in range(said))
        assert float(found.log_probs_BW[row, 0]) == pytest.approx(expected, rel=1e-5)


def test_a_token_that_is_ruled_out_is_never_said_and_takes_no_probability():
    generator = np.random.default_rng(1)
    table = generator.normal(size=(4, 6, 10))
    banned = [0, 3, 7]
    table[:, :, banned] = NEVER
    table[0, 0, 4:] = NEVER  # all but 1 and 2
    step, cache = by_position(table)
    found = greedy(step, cache, jnp.zeros(4, jnp.int32), jnp.full(4, 6), length=6, eos=EOS)
    assert not np.isin(found.tokens_BWT, banned).any()
    assert int(found.tokens_BWT[0, 0, 0]) in (1, 2)
    assert np.all(np.isfinite(found.log_probs_BW)) and np.all(np.asarray(found.log_probs_BW) < 0)
    allowed = [i for i in range(10) if i not in banned]
    row = 1
    said = min(int(found.lengths_BW[row, 0]) + 1, 6)
    expected = sum(log_softmax(table[row, t][allowed]).max() for t in range(said))
    assert float(found.log_probs_BW[row, 0]) == pytest.approx(expected, rel=1e-5)


def test_of_equals_the_first_is_taken():
    found = greedy(
        by_last_token([[0.0, 0.0, 7.0, 7.0, 7.0]] * 5), (), jnp.zeros(1, jnp.int32), jnp.array([3]), length=3, eos=EOS
    )
    np.testing.assert_array_equal(found.tokens_BWT[0, 0], [2, 2, 2])


def test_logits_of_any_size_give_finite_log_probabilities():
    found = greedy(
        by_last_token([[0.0, -3e4, 3e4, 2.9e4]] * 4), (), jnp.zeros(1, jnp.int32), jnp.array([2]), length=2, eos=EOS
    )
    assert float(found.log_probs_BW[0, 0]) == pytest.approx(0.0, abs=1e-6)


def test_not_a_number_ends_the_sentence():
    """As a broken model gives: no token is the likeliest, and none that doesn't exist may be said."""
    table = np.zeros((2, 3, 4))
    table[:, :, 2] = 5
    table[0, 1, 3] = np.nan
    step, cache = by_position(table)
    found = greedy(step, cache, jnp.zeros(2, jnp.int32), jnp.full(2, 3), length=3, eos=EOS)
    np.testing.assert_array_equal(found.tokens_BWT[:, 0], [[2, 1, 1], [2, 2, 2]])
    assert np.isnan(found.log_probs_BW[0, 0]) and np.isfinite(found.log_probs_BW[1, 0])


def test_the_search_stops_as_soon_as_all_sentences_have_ended():
    calls = []

    def step(tokens_BW, cache):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((2, 1, 3)).at[:, :, EOS].set(1.0), cache

    found = greedy(step, (), jnp.zeros(2, jnp.int32), jnp.full(2, 50), length=50, eos=EOS)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(calls) == 1
