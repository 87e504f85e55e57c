"""Beam search on tables of numbers, which can be followed by hand or enumerated to the last hypothesis."""

import itertools

import numpy as np
import pytest

from tests.decoding.searching import BOS, EOS, NEVER, ByPast, beam, by_last_token, greedy, limits, log_softmax, said
from tfm.decoding.search import Cache
from tfm.decoding.translation import length_penalty

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
    cache, bounds = past.cache(10), limits([9] * 400, least=[0, 3] * 200)
    by_greedy = greedy(past.step, cache, bounds)
    found = beam(past.step, past.cache(10), bounds, beams=beams, alpha=0.6)
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
    cache = past.cache(LONGEST + 1)
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
    found = beam(past.step, past.cache(9), limits(most), beams=beams, n_best=n_best, alpha=alpha)
    for row in range(100):
        expected = narrow_beam(past, row, most[row], beams, n_best, alpha)
        scores = np.asarray(found.log_probs_BW[row]) / length_penalty(found.lengths_BW[row] + 1, alpha)
        np.testing.assert_allclose(scores[: len(expected)], expected, rtol=1e-4, atol=1e-4)
