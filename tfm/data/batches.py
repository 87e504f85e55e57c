"""Batch k: the rows that the plan gives it, filled with tokens, and put on the mesh.

A batch is asked for by number. Each host builds exactly the rows that its devices hold; two hosts may hold the same
row, and then both build it. There is no state to save: the loop's step number is the whole position in the data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tfm.config import Config, InputError
from tfm.data.bins import pack
from tfm.data.packing import Lengths, Permutation, Plan, Rows, pair_lengths
from tfm.data.tokenizer import BOS, PAD

if TYPE_CHECKING:
    import os

    import jax

_log = logging.getLogger(__name__)

_THREADS = 2  # that build batches ahead; a batch costs milliseconds, so more would only contend for the interpreter
_LENGTH_STEP = 64  # validation rows that must be longer than training's are a multiple of this


class Table(Lengths, Protocol):
    """What batches need of a table of pairs (`tfm.data.store.PairTable`)."""

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target token ids, each ending in the end token."""
        ...


class Store(Protocol):
    """What batches need of the token store (`tfm.data.store.TokenStore`)."""

    @property
    def directory(self) -> os.PathLike[str] | None: ...

    @property
    def corpus_hash(self) -> str: ...

    def tables(self, split: str) -> Sequence[Table]: ...


class Batch(NamedTuple):
    """Packed rows, all int32. Segments count a row's pairs from 1, 0 is padding; positions restart with each pair."""

    source_tokens: Any
    """[B, S], each pair ending in EOS."""
    source_segments: Any
    """[B, S]."""
    source_positions: Any
    """[B, S]."""
    target_inputs: Any
    """[B, T], BOS y1 .. yn."""
    target_outputs: Any
    """[B, T], y1 .. yn EOS."""
    target_segments: Any
    """[B, T]."""
    target_positions: Any
    """[B, T]."""
    rows: Any
    """[B], the row's number within the global batch, which dropout counts with."""


class _Batches:
    """Batches of a fixed shape out of rows that `_rows` tells: the part that training and validation share."""

    def __init__(self, tables: Sequence[Table], config: Config, rows: int, source_length: int, target_length: int):
        self.tables = tables
        self.rows_per_batch = rows
        self._read_ahead = config.data.read_ahead
        self.source_length = source_length
        """Source tokens in a row."""
        self.target_length = target_length
        """Target tokens in a row."""

    def _rows(self, batch: int) -> Rows:
        raise NotImplementedError

    def host_batch(self, k: int, rows: Sequence[int] | np.ndarray | slice | None = None) -> Batch:
        """Those rows (all of them unless given) of batch k, as NumPy arrays with B = len(rows)."""
        numbers = np.arange(self.rows_per_batch, dtype=np.int32)
        if rows is not None:
            numbers = numbers[rows if isinstance(rows, slice) else np.asarray(rows, np.int64)]
        wanted = self._rows(k).take(numbers)
        pairs = [self.tables[c].pair(i) for c, i in zip(wanted.tables.tolist(), wanted.pairs.tolist(), strict=True)]
        source = _laid_out([pair[0] for pair in pairs], wanted.offsets, self.source_length)
        target = _laid_out([pair[1] for pair in pairs], wanted.offsets, self.target_length)
        inputs = np.zeros_like(target.tokens)
        inputs[:, 1:] = target.tokens[:, :-1]
        inputs[(target.positions == 0) & (target.segments > 0)] = BOS
        inputs[target.segments == 0] = PAD
        return Batch(*source, inputs, *target, numbers)

    def global_batch(self, k: int, sharding: jax.sharding.Sharding) -> Batch:
        """Batch k as global arrays, each host building the rows of its own devices, once.

        Args:
          k: number of the batch, from 0.
          sharding: how the leading axis lies on the mesh, such as NamedSharding(mesh, P(("data", "fsdp"))).
        """
        import jax

        count = self.rows_per_batch
        held = [index[0].indices(count) for index in sharding.addressable_devices_indices_map((count,)).values()]
        rows = np.unique(np.concatenate([np.arange(*span) for span in held]))
        local = self.host_batch(k, rows)

        def whole(field: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(count)
                return field[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]

            return jax.make_array_from_callback((count, *field.shape[1:]), sharding, part)

        return Batch(*map(whole, local))

    def read_ahead(
        self, start: int, stop: int, sharding: jax.sharding.Sharding | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """(k, batch k) for start <= k < stop, in order, built ahead by threads; on the mesh when a sharding is given.

        An error in a thread is raised here, at the batch it concerns. Close the iterator to stop early.
        """
        import grain

        if stop <= start:
            return
        options = grain.ReadOptions(num_threads=min(_THREADS, self._read_ahead), prefetch_buffer_size=self._read_ahead)
        reader = iter(grain.MapDataset.source(_Numbered(self, start, stop, sharding)).to_iter_dataset(options))
        try:
            yield from reader
        finally:
            reader.close()


class TrainBatches(_Batches):
    """The batches of a run: batch k is a pure function of (corpus, seed, k), for any k from 0 on; thread-safe."""

    def __init__(self, store: Store, split: str, config: Config, *, remember: bool = True):
        """Raises InputError when the split has no pair. `remember`: keep the plan's row counts in the store."""
        data = config.data
        lengths = (data.source_row_length, data.target_row_length)
        super().__init__(store.tables(split), config, config.rows_per_batch, *lengths)
        self.plan = Plan(
            self.tables,
            {"corpus_hash": store.corpus_hash, "split": split},
            seed=config.training.seed,
            row_lengths=lengths,
            window_pairs=data.window_pairs,
            memory=store.directory if remember else None,
        )
        self.plan_identity: dict[str, Any] = {**self.plan.identity, "rows_per_batch": self.rows_per_batch}
        """What decides batch k; stands in the checkpoint, and a run is not resumed under another."""
        if self.plan.rows_per_epoch < self.rows_per_batch:
            _log.warning(
                "split %s fills %d rows, and a batch has %d: a batch holds the same pairs more than once; lower "
                "training.target_tokens_per_batch, or add pairs",
                split,
                self.plan.rows_per_epoch,
                self.rows_per_batch,
            )

    def _rows(self, batch: int) -> Rows:
        return self.plan.rows(batch * self.rows_per_batch, (batch + 1) * self.rows_per_batch)

    def epoch(self, k: int) -> float:
        """Epochs, with the fraction, that lie before batch k."""
        return self.plan.epoch_of(k * self.rows_per_batch)

    def describe(self) -> dict[str, Any]:
        """Figures of the plan; rows and padding are those of the first window."""
        return {
            "rows_per_batch": self.rows_per_batch,
            "source_row_length": self.source_length,
            "target_row_length": self.target_length,
            **self.plan.describe(),
        }


class _Numbered:
    """Batches start..stop-1 as Grain's random-access source."""

    def __init__(self, batches: _Batches, start: int, stop: int, sharding: jax.sharding.Sharding | None):
        self._batches, self._start, self._stop, self._sharding = batches, start, stop, sharding

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        k = self._start + int(index)
        built = self._batches.host_batch(k) if self._sharding is None else self._batches.global_batch(k, self._sharding)
        return k, built


class ValidationBatches(_Batches):
    """Every pair of some tables exactly once, packed; the last batch ends in empty rows. The same on every host.

    Rows are as long as training's, or, if a pair is longer than that, as the longest pair: nothing is ever dropped. A
    batch has so many rows that it takes no more memory than a part of training's, of `training.gradient_accumulation`.
    """

    def __init__(self, tables: Sequence[Table], config: Config, shards: int):
        """The number of rows is a multiple of `shards`. Raises InputError when there is no pair."""
        # Pairs lie in corpus order, where neighbours may be of like length; packing wants them mixed.
        numbers = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
        if not len(numbers):
            raise InputError("no pair to validate on: the split is empty; name another with data.validation_split")
        pairs = np.concatenate([np.arange(len(table)) for table in tables])
        mixed = Permutation(len(pairs), key=0)(np.arange(len(pairs)))
        numbers, pairs = numbers[mixed], pairs[mixed]
        source, target = pair_lengths(tables, numbers, pairs)
        source_length = _row_length(config.data.source_row_length, int(source.max()))
        target_length = _row_length(config.data.target_row_length, int(target.max()))
        longer = max(source_length / config.data.source_row_length, target_length / config.data.target_row_length)
        parts = config.training.gradient_accumulation * math.ceil(longer**2)  # attention grows with the square
        rows = shards * max(1, config.rows_per_batch // shards // parts)
        if config.rows_per_batch // shards < parts:
            longest = np.argmax(np.maximum(source, target))
            _log.warning(
                "%s: validation pair %d has %d and %d tokens: rows of %d and %d tokens, in which nothing is "
                "dropped, take more memory than training's of %d and %d",
                *(tables[numbers[longest]].name, pairs[longest] + 1, source[longest], target[longest]),
                *(source_length, target_length, config.data.source_row_length, config.data.target_row_length),
            )
        super().__init__(tables, config, rows, source_length, target_length)
        self._packed = Rows.grouped(*pack(source, target, source_length, target_length), numbers, pairs)

    def __len__(self) -> int:
        return -(-len(self._packed) // self.rows_per_batch)

    def _rows(self, batch: int) -> Rows:
        if not 0 <= batch < len(self):
            raise IndexError(f"validation batch {batch} of {len(self)}")
        return self._packed.take(np.arange(batch * self.rows_per_batch, (batch + 1) * self.rows_per_batch))


def validation_batches(store: Store, split: str, config: Config, shards: int = 1) -> ValidationBatches:
    """The validation batches of a split, for a mesh with so many batch shards; corpus weights play no part."""
    return ValidationBatches(store.tables(split), config, shards)


def _row_length(configured: int, longest: int) -> int:
    return configured if longest <= configured else -(-longest // _LENGTH_STEP) * _LENGTH_STEP


class _Side(NamedTuple):
    """One side of some rows, each field int32 [B, length]."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


def _laid_out(sentences: list[np.ndarray], offsets: np.ndarray, length: int) -> _Side:
    """Sentences end to end in rows: row i holds sentences offsets[i] to offsets[i + 1]."""
    side = _Side(*np.zeros((3, len(offsets) - 1, length), np.int32))
    if not sentences:
        return side
    counts = np.fromiter(map(len, sentences), np.int64, len(sentences))
    starts = np.concatenate([[0], np.cumsum(counts)])
    per_row = np.diff(offsets)
    row = np.repeat(np.arange(len(per_row)), per_row)
    # Where a sentence begins in the flat array of rows, less where it begins among the tokens of all sentences.
    shift = row * length - np.repeat(starts[offsets[:-1]], per_row)
    tokens = np.arange(starts[-1])
    places = tokens + np.repeat(shift, counts)
    segments = np.arange(len(sentences)) - np.repeat(offsets[:-1], per_row) + 1
    side.tokens.reshape(-1)[places] = np.concatenate(sentences)
    side.segments.reshape(-1)[places] = np.repeat(segments, counts)
    side.positions.reshape(-1)[places] = tokens - np.repeat(starts[:-1], counts)
    return side
