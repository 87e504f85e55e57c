"""Sentence pairs of random tokens, for the packing and the batches of training: a corpus that takes no reading."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tfm.data.tokenizer import EOS

_TOKENS = 1 << 20  # drawn for all pairs
_STRIDE = 2_654_435_761  # odd, and far from any multiple of that: neighbours begin far apart (Knuth)
_FIRST_WORD = 4  # ids below are padding, the end, the beginning and the unknown token

# Pieces a sentence of WMT 2014 English-German has, about: log-normal, 26 on average.
_MEDIAN_LENGTH, _SIGMA = 22.0, 0.6
# The logarithm of how much longer a translation is than its source has this deviation.
_RATIO_SIGMA = 0.15


class SyntheticTable:
    """Pairs as `tfm.data.batches.Table` has them, each a pure function of its number.

    Args:
      lengths: "full" makes every pair fill a row; "natural" draws lengths like those of a news corpus.
      row_lengths: source and target tokens in a row; no sentence is longer.
      vocab_size: tokens are drawn evenly from the ids below.
      pairs: how many.
    """

    weight = 1.0

    def __init__(
        self, lengths: Literal["full", "natural"], row_lengths: tuple[int, int], vocab_size: int, pairs: int
    ) -> None:
        self.name = f"synthetic {lengths}"
        # Of which each sentence is a piece: a pair costs what one of a store does, and no drawing.
        first = min(_FIRST_WORD, vocab_size - 1)
        self._tokens = np.random.default_rng(1).integers(first, vocab_size, _TOKENS + max(row_lengths), np.int32)
        if lengths == "full":
            source, target = (np.full(pairs, length) for length in row_lengths)
        else:
            generator = np.random.default_rng(0)
            source = _MEDIAN_LENGTH * np.exp(_SIGMA * generator.standard_normal(pairs))
            target = source * np.exp(_RATIO_SIGMA * generator.standard_normal(pairs))
        self._lengths = {
            "source": np.clip(source, 2, row_lengths[0]).astype(np.int32),
            "target": np.clip(target, 2, row_lengths[1]).astype(np.int32),
        }

    def __len__(self) -> int:
        return len(self._lengths["source"])

    def lengths(self, side: Literal["source", "target"], indices: np.ndarray) -> np.ndarray:
        return self._lengths[side][indices]

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source, target = (
            self._tokens[start : start + self._lengths[side][index]].copy()
            for start, side in ((index * _STRIDE % _TOKENS, "source"), (~index * _STRIDE % _TOKENS, "target"))
        )
        source[-1] = target[-1] = EOS
        return source, target


class SyntheticStore:
    """A token store (`tfm.data.batches.Store`) of one synthetic table, whatever the split."""

    directory = None

    def __init__(self, table: SyntheticTable) -> None:
        self._table = table
        self.corpus_hash = f"{table.name} {len(table)}"

    def tables(self, split: str) -> list[SyntheticTable]:
        return [self._table]
