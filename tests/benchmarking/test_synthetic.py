"""Synthetic pairs: pure functions of their number, within their rows."""

import numpy as np
import pytest

from tfm.benchmarking.synthetic import SyntheticStore, SyntheticTable
from tfm.data.tokenizer import EOS


@pytest.mark.parametrize("lengths", ["full", "natural"])
def test_pairs_have_their_lengths_and_end_in_the_end_token(lengths):
    table = SyntheticTable(lengths, (24, 40), 100, 50)
    assert len(table) == 50
    for index in range(50):
        for side, tokens in zip(("source", "target"), table.pair(index), strict=True):
            assert len(tokens) == table.lengths(side, np.array([index]))[0]
            assert tokens[-1] == EOS
            assert np.all((tokens[:-1] >= 4) & (tokens[:-1] < 100))
    assert table.pair(3)[0].tolist() != table.pair(4)[0].tolist()
    np.testing.assert_array_equal(table.pair(3)[0], SyntheticTable(lengths, (24, 40), 100, 50).pair(3)[0])


def test_full_pairs_fill_their_rows():
    table = SyntheticTable("full", (24, 40), 100, 5)
    assert set(table.lengths("source", np.arange(5))) == {24}
    assert set(table.lengths("target", np.arange(5))) == {40}


def test_natural_lengths_are_like_those_of_news():
    lengths = SyntheticTable("natural", (256, 256), 100, 20_000).lengths("source", np.arange(20_000))
    assert 25 < lengths.mean() < 29
    assert np.percentile(lengths, 90) > 2 * np.percentile(lengths, 25)


def test_a_store_has_one_table_for_any_split():
    table = SyntheticTable("full", (8, 8), 10, 4)
    assert SyntheticStore(table).tables("train") == SyntheticStore(table).tables("other") == [table]
    assert SyntheticStore(table).corpus_hash != SyntheticStore(SyntheticTable("full", (8, 8), 10, 5)).corpus_hash
