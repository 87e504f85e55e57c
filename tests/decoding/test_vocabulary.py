"""The likeliest tokens, the normaliser and the truncation, each against NumPy."""

import jax
import numpy as np
import pytest

from tfm.decoding.vocabulary import Vocabulary, truncated

EOS = 1


@pytest.mark.parametrize(("beams", "vocab", "count"), [(1, 5, 1), (3, 300, 4), (4, 256, 12), (2, 129, 20)])
def test_the_best_tokens_are_those_of_a_sort(beams, vocab, count):
    """Few different numbers, so that nearly all of them tie: the first beam comes first, then the first id."""
    generator = np.random.default_rng(vocab)
    logits = generator.integers(0, 9, (6, beams, vocab)).astype(np.float32)
    logits[0, :, ::3] = -np.inf
    base = generator.integers(-4, 1, (6, beams)).astype(np.float32)
    banned = [0, vocab - 1]
    logits[1, :, banned] = [[1e30], [np.inf]]
    vocabulary = Vocabulary(vocab, EOS, banned)
    sums, of_beams, tokens = jax.jit(lambda: vocabulary.best_tokens(logits, vocabulary.maxima(logits), base, count))()
    for row in range(6):
        its = logits[row] + base[row][:, None]
        its[:, [EOS, *banned]] = -np.inf
        order = np.argsort(-its, axis=None, kind="stable")[:count]
        expected = its.reshape(-1)[order]
        np.testing.assert_array_equal(sums[row], expected)
        there = np.isfinite(expected)
        np.testing.assert_array_equal(np.asarray(of_beams[row])[there], (order // vocab)[there])
        np.testing.assert_array_equal(np.asarray(tokens[row])[there], (order % vocab)[there])


def test_the_normaliser_counts_the_end_and_nothing_that_is_banned():
    logits = np.random.default_rng(0).normal(size=(2, 3, 200)).astype(np.float32) * 20
    logits[0, 0, EOS] = 500
    banned = [0, 7, 150, 199]
    left = np.delete(logits, banned, axis=-1).astype(np.float64)
    expected = np.log(np.exp(left - 500).sum(-1)) + 500
    logits[..., banned] = [1e30, np.inf, 400, -3]  # whatever they are
    vocabulary = Vocabulary(200, EOS, banned)
    peak, rest = vocabulary.log_normaliser(logits, vocabulary.maxima(logits))
    np.testing.assert_array_equal(peak, left.max(-1))
    np.testing.assert_allclose(peak + rest, expected, rtol=1e-6)
    chosen = vocabulary.logits_of(logits, np.array([[7, 8, 199], [EOS, 150, 9]]))
    np.testing.assert_array_equal(
        chosen, [[-np.inf, logits[0, 1, 8], -np.inf], [logits[1, 0, EOS], -np.inf, logits[1, 2, 9]]]
    )


def test_truncation_keeps_the_likeliest_and_no_more():
    logits = np.log(np.array([[[0.5, 0.1, 0.25, 0.15]]], np.float32))
    for settings, kept in (
        ((2, 1.0), [0, 2]),
        ((0, 0.5), [0]),
        ((0, 0.6), [0, 2]),
        ((0, 1.0), [0, 1, 2, 3]),
        ((9, 0.91), [0, 1, 2, 3]),
    ):
        found = np.asarray(truncated(logits, *settings))[0, 0]
        assert np.flatnonzero(np.isfinite(found)).tolist() == kept
        np.testing.assert_array_equal(found[kept], logits[0, 0, kept])
