"""Packing one window: no row overflows, none is empty, and rows are nearly as few as the tokens allow."""

import numpy as np
import pytest

from tfm.data.bins import pack


def _captions(pairs, mean, spread, correlation, longest, seed=0):
    """Lengths like those of real sentences: log-normal, the sides correlated."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, pairs))
    sides = [a, correlation * a + (1 - correlation**2) ** 0.5 * b]
    sigma = np.log1p((spread / mean) ** 2) ** 0.5
    return [
        np.clip(np.exp(np.log(mean) - sigma**2 / 2 + sigma * z).round(), 2, longest).astype(np.int32) for z in sides
    ]


def _check(source, target, source_row, target_row):
    row_of, rows = pack(source, target, source_row, target_row)
    filled_s = np.bincount(row_of, weights=source, minlength=rows)
    filled_t = np.bincount(row_of, weights=target, minlength=rows)
    assert len(filled_s) == rows
    assert row_of.min() == 0
    assert filled_s.max() <= source_row
    assert filled_t.max() <= target_row
    assert filled_s.min() > 0
    return 1 - filled_s.mean() / source_row, 1 - filled_t.mean() / target_row


@pytest.mark.parametrize(
    ("source_row", "target_row", "most_source", "most_target"),
    [
        (64, 64, 0.05, 0.05),
        (96, 96, 0.035, 0.035),
        (128, 128, 0.03, 0.03),
        (64, 72, 0.05, 0.16),
        (256, 256, 0.02, 0.02),
    ],
)
def test_rows_of_captions_are_nearly_full(source_row, target_row, most_source, most_target):
    source, target = _captions(20_000, 16, 5.3, 0.85, 60)
    padding = _check(source, target, source_row, target_row)
    assert padding[0] < most_source
    assert padding[1] < most_target


def test_rows_of_news_are_nearly_full():
    source, target = _captions(60_000, 27, 15, 0.93, 256)
    assert max(_check(source, target, 256, 256)) < 0.025


def test_rows_of_documents_are_nearly_full():
    source, target = _captions(5_000, 400, 220, 0.95, 2048)
    assert max(_check(source, target, 2048, 2048)) < 0.06


@pytest.mark.parametrize("pairs", [1, 2, 3, 10, 500])
@pytest.mark.parametrize("rows", [(256, 256), (300, 1000), (256, 4096)])
def test_any_lengths_fit(pairs, rows):
    source, target = np.random.default_rng(pairs).integers(1, 257, (2, pairs)).astype(np.int32)
    _check(source, target, *rows)


def test_equal_pairs_fill_rows_exactly():
    source, target = np.full(1000, 8, np.int32), np.full(1000, 8, np.int32)
    row_of, rows = pack(source, target, 64, 64)
    assert rows == 125
    assert np.array_equal(np.bincount(row_of), np.full(125, 8))


def test_sides_that_complement_each_other_share_rows():
    source = np.array([60, 4] * 50, np.int32)
    target = np.array([4, 60] * 50, np.int32)
    assert pack(source, target, 64, 64)[1] == 50


def test_pairs_as_long_as_a_row_take_it_alone():
    length = np.full(30, 999, np.int32)  # not a multiple of the unit that lengths are counted in
    row_of, rows = pack(length, length, 999, 999)
    assert rows == 30
    assert np.array_equal(np.sort(row_of), np.arange(30))


def test_no_pairs_no_rows():
    none = np.zeros(0, np.int32)
    assert pack(none, none, 64, 64)[1] == 0


def test_lengths_are_mixed_within_rows():
    """What is chosen to fill a row must not sort the corpus: a row's longest pair is as long as in random rows."""
    source, target = _captions(30_000, 16, 5.3, 0.85, 60)
    row_of, rows = pack(source, target, 128, 128)
    longest = np.zeros(rows, np.int32)
    np.maximum.at(longest, row_of, target)
    by_chance = [max(group) for group in np.array_split(target, rows)]
    assert abs(longest.mean() / np.mean(by_chance) - 1) < 0.1
