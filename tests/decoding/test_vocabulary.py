"""The likeliest tokens, the normaliser and the truncation, each against NumPy."""

import jax
import numpy as np
import pytest

from tfm.decoding.vocabulary import best_tokens, log_normaliser, maxima, truncated

EOS = 1


@pytest.mark.parametrize(("beams", "vocab", "count"), [(1, 5, 1), (3, 300, 4), (4, 256, 12), (2, 129, 20)])
def test_the_best_tokens_are_those_of_a_sort(beams, vocab, count):
    """Few different numbers, so that nearly all of them tie: the first beam comes first, then the first id."""
    generator = np.random.default_rng(vocab)
    logits = generator.integers(0, 9, (6, beams, vocab)).astype(np.float32)
    logits[0, :, ::3] = -np.inf
    base = generator.integers(-4, 1, (6, beams)).astype(np.float32)
    sums, of_beams, tokens = jax.jit(lambda: best_tokens(logits, maxima(logits, EOS), base, count, EOS))()
    for row in range(6):
        its = logits[row] + base[row][:, None]
        its[:, EOS] = -np.inf
        order = np.argsort(-its, axis=None, kind="stable")[:count]
        expected = its.reshape(-1)[order]
        np.testing.assert_array_equal(sums[row], expected)
        there = np.isfinite(expected)
        np.testing.assert_array_equal(np.asarray(of_beams[row])[there], (order // vocab)[there])
        np.testing.assert_array_equal(np.asarray(tokens[row])[there], (order % vocab)[there])


def test_the_normaliser_counts_what_the_search_leaves_out():
    logits = np.random.default_rng(0).normal(size=(2, 3, 200)).astype(np.float32) * 20
    logits[0, 0, EOS] = 500
    expected = np.log(np.exp(logits.astype(np.float64) - 500).sum(-1)) + 500
    peak, rest = log_normaliser(logits, maxima(logits, EOS), EOS)
    np.testing.assert_array_equal(peak, logits.max(-1))
    np.testing.assert_allclose(peak + rest, expected, rtol=1e-6)


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
