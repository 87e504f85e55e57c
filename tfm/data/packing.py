"""Which pairs share a row: the plan of every epoch, as a pure function of (corpus, seed, row number).

An epoch is a keyed permutation of the pairs, cut into windows that pack by themselves. Nothing here is a position in a
stream: row r of the training data can be asked for at any time, in any process, and is always the same. The plan knows
lengths only, no tokens, and is NumPy alone. All arithmetic is on integers and all sorting is stable, so that a plan
depends neither on the machine nor on NumPy's version.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from tfm.config import InputError
from tfm.data.bins import pack
from tfm.data.permutation import Permutation, derive_key, hash64

PLAN_VERSION = 1
"""Goes up whenever the same corpus and seed would give other rows; checkpoints of an older plan are refused."""

_log = logging.getLogger(__name__)


class Lengths(Protocol):
    """What the plan needs of a table of pairs (`tfm.data.store.PairTable`)."""

    name: str
    weight: float

    def __len__(self) -> int: ...

    def lengths(self, side: Literal["source", "target"], indices: np.ndarray) -> np.ndarray:
        """Tokens of one side of those pairs, int32, the end token included."""
        ...


class Rows(NamedTuple):
    """Consecutive rows: row i holds the pairs offsets[i] to offsets[i + 1] of `tables` and `pairs`."""

    offsets: np.ndarray
    """int64 [rows + 1]."""
    tables: np.ndarray
    """int32 [pairs], which table."""
    pairs: np.ndarray
    """int64 [pairs], which pair of that table."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def grouped(cls, row_of: np.ndarray, rows: int, tables: np.ndarray, pairs: np.ndarray) -> Rows:
        """Rows 0..rows-1 out of the row of each pair; pairs keep their order within a row."""
        order = np.argsort(row_of, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
        return cls(offsets, tables[order], pairs[order])

    def take(self, rows: np.ndarray) -> Rows:
        """Those rows, in that order; a row number past the end is an empty row."""
        inside = np.minimum(rows, max(len(self) - 1, 0))
        starts = self.offsets[inside]
        counts = np.where(rows < len(self), self.offsets[np.minimum(inside + 1, len(self))] - starts, 0)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        members = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return Rows(offsets, self.tables[members], self.pairs[members])


class Epochs:
    """Which pair is drawn at which place of which epoch, from tables that mix by weight.

    Table c of n pairs and weight w gives round(w * n) draws an epoch, at least 1. Its draws are numbered on across
    epochs, and each n of them are one pass, in an order of its own: a weight of 0.5 sees each pair once in two epochs.
    """

    def __init__(self, tables: Sequence[Lengths], key: int):
        """Raises InputError when there is no pair at all."""
        self.tables = tables
        self._key = key
        self._sizes = [len(table) for table in tables]
        self.draws = [max(1, round(table.weight * len(table))) if len(table) else 0 for table in tables]
        self.length = sum(self.draws)
        """Draws in an epoch."""
        if not self.length:
            names = ", ".join(table.name for table in tables) or "none"
            raise InputError(f"no pair to train on in the token store (corpora: {names}): run `prepare` on a corpus")
        self._starts = np.cumsum([0, *self.draws])

    def drawn(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables (int32) and pairs (int64) at the places start..stop-1 of an epoch."""
        draws = Permutation(self.length, derive_key(self._key, "epoch", epoch))(np.arange(start, stop))
        tables = (np.searchsorted(self._starts, draws, side="right") - 1).astype(np.int32)
        pairs = draws - self._starts[tables]
        for c, (size, count) in enumerate(zip(self._sizes, self.draws, strict=True)):
            if size == count:
                continue  # one pass is one epoch, whose own order is random enough
            mine = np.flatnonzero(tables == c)
            passes, places = np.divmod(epoch * count + pairs[mine], size)
            for number in range(epoch * count // size, ((epoch + 1) * count - 1) // size + 1):
                of_pass = passes == number
                order = Permutation(size, derive_key(self._key, "pass", c, number))
                pairs[mine[of_pass]] = order(places[of_pass])
        return tables, pairs


def pair_lengths(tables: Sequence[Lengths], numbers: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source and target tokens (int32) of each pair; `numbers` says which table it is in."""
    source, target = np.zeros(len(pairs), np.int32), np.zeros(len(pairs), np.int32)
    for c, table in enumerate(tables):
        mine = np.flatnonzero(numbers == c) if len(tables) > 1 else slice(None)
        source[mine], target[mine] = table.lengths("source", pairs[mine]), table.lengths("target", pairs[mine])
    return source, target


class Plan:
    """The rows of all epochs, one after another without a gap; safe to ask from several threads.

    A window is planned in the background when the one before it is first used. Only the rows of each window are
    remembered, in `memory`, so that a row far into a run costs one window and not all those before it; without that
    file, or if it cannot be written, they are counted again.
    """

    KEPT_WINDOWS = 3  # planned ones: the one in use, the next, and one for a reader that lags behind
    KEPT_PAIRS = 1_000_000  # small windows are kept up to so many pairs, since a batch may span several of them,
    KEPT_SMALL_WINDOWS = 256  # and up to so many windows
    SECONDS_BETWEEN_NOTES = 10

    def __init__(
        self,
        tables: Sequence[Lengths],
        identity: dict[str, Any],
        *,
        seed: int,
        row_lengths: tuple[int, int],
        window_pairs: int,
        memory: str | os.PathLike[str] | None = None,
    ):
        """`identity`: what tells the corpus from another (its hash, its split), as JSON values; it keys every order.
        `memory`: the directory for the file of row counts.
        """
        self.identity = {
            "plan_version": PLAN_VERSION,
            **identity,
            "seed": seed,
            "source_row_length": row_lengths[0],
            "target_row_length": row_lengths[1],
            "window_pairs": window_pairs,
        }
        self.row_lengths = row_lengths
        self._key = derive_key(PLAN_VERSION, sorted(identity.items()), seed)
        self.epochs = Epochs(tables, self._key)
        self.windows = -(-self.epochs.length // window_pairs)
        """Windows in an epoch, of equal length but for one pair."""
        pairs = -(-self.epochs.length // self.windows)
        self._kept_windows = max(self.KEPT_WINDOWS, min(self.KEPT_PAIRS // pairs, self.KEPT_SMALL_WINDOWS))
        path = Path(memory) / f"plan-{derive_key(self.identity):016x}.json" if memory is not None else None
        self._memory = RowMemory(path, self.identity)
        self._ends = np.cumsum(self._memory.counts).tolist()  # row number at which each window ends
        self._planned: dict[int, Future[Rows]] = {}
        self._lock = threading.Lock()
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")

    def rows(self, start: int, stop: int) -> Rows:
        """The rows start..stop-1, counted from the first row of the first epoch."""
        parts = []
        while start < stop:
            number, first, end = self._find(start)
            window = self._window(number)
            self._request(number + 1)
            parts.append(window.take(np.arange(start - first, min(stop, end) - first)))
            start = min(stop, end)
        offsets = np.cumsum([0, *(len(part.pairs) for part in parts)])
        joined = [part.offsets[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
        return Rows(
            np.concatenate([[0], *joined]).astype(np.int64),
            np.concatenate([part.tables for part in parts] or [np.zeros(0, np.int32)]),
            np.concatenate([part.pairs for part in parts] or [np.zeros(0, np.int64)]),
        )

    def epoch_of(self, row: int) -> float:
        """Epochs, counted from 0 and with the fraction, that lie before a row."""
        number, first, end = self._find(row)
        return (number + (row - first) / (end - first)) / self.windows

    def describe(self) -> dict[str, float]:
        """Rows of an epoch and the padding in them, by the first window."""
        rows = self._window(0)
        source, target = (int(side.sum()) for side in pair_lengths(self.epochs.tables, rows.tables, rows.pairs))
        return {
            "pairs_per_epoch": self.epochs.length,
            "windows_per_epoch": self.windows,
            "rows_per_epoch": self.rows_per_epoch,
            "source_padding": 1 - source / (len(rows) * self.row_lengths[0]),
            "target_padding": 1 - target / (len(rows) * self.row_lengths[1]),
        }

    def counts(self) -> list[int]:
        """Rows of each window so far: all that `recall` needs, in a checkpoint that travels without the file."""
        with self._lock:
            return list(self._memory.counts)

    def recall(self, counts: Sequence[int]) -> None:
        """Takes over what `counts` said, as far as it goes beyond what is known here already."""
        with self._lock:
            for rows in counts[len(self._ends) :]:
                self._ends.append((self._ends[-1] if self._ends else 0) + rows)
                self._memory.add(rows, 0.0)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch, as far as its first window tells."""
        return self._find(0)[2] * self.windows

    def _find(self, row: int) -> tuple[int, int, int]:
        """The window of a row, counted over all epochs, with its first row and its end; counts windows up to there."""
        noted = time.monotonic()
        while not self._ends or self._ends[-1] <= row:
            self._window(len(self._ends))
            if time.monotonic() - noted > self.SECONDS_BETWEEN_NOTES:
                noted = time.monotonic()
                _log.info("counting rows: %d windows hold %d, on the way to row %d", *self._counted(), row)
        number = bisect.bisect_right(self._ends, row)
        return number, self._ends[number - 1] if number else 0, self._ends[number]

    def _counted(self) -> tuple[int, int]:
        return len(self._ends), self._ends[-1]

    def _window(self, number: int) -> Rows:
        return self._request(number).result()

    def _request(self, number: int) -> Future[Rows]:
        """Has a window planned, unless it is there or under way."""
        with self._lock:
            future = self._planned.pop(number, None)
            if future is None or (future.done() and future.exception()):
                future = self._planner.submit(self._plan_window, number)
            self._planned[number] = future  # the newest last
            while len(self._planned) > self._kept_windows:
                self._planned.pop(next(iter(self._planned)))
        return future

    def _plan_window(self, number: int) -> Rows:
        began = time.monotonic()
        epoch, part = divmod(number, self.windows)
        start, stop = (self.epochs.length * (part + side) // self.windows for side in (0, 1))
        tables, pairs = self.epochs.drawn(epoch, start, stop)
        source, target = pair_lengths(self.epochs.tables, tables, pairs)
        self._refuse_long(tables, pairs, source, target)
        row_of, rows = pack(source, target, *self.row_lengths)
        shuffled = np.argsort(hash64(np.arange(rows), derive_key(self._key, "rows", number)), kind="stable")
        place = np.empty(rows, np.int32)
        place[shuffled] = np.arange(rows, dtype=np.int32)
        with self._lock:
            if number < len(self._ends):
                self._memory.check(number, rows)
            elif number == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + rows)
                self._memory.add(rows, time.monotonic() - began)
        return Rows.grouped(place[row_of], rows, tables, pairs)

    def _refuse_long(self, tables: np.ndarray, pairs: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
        long = np.flatnonzero((source > self.row_lengths[0]) | (target > self.row_lengths[1]))
        if len(long):
            i = long[0]
            raise InputError(
                f"corpus {self.epochs.tables[tables[i]].name}: pair {pairs[i]} has {source[i]} source and {target[i]} "
                f"target tokens, and a row holds data.source_row_length={self.row_lengths[0]} and "
                f"data.target_row_length={self.row_lengths[1]} ({len(long)} such pairs): run `prepare` again with "
                "these lengths, which drops them, or raise the lengths"
            )


class RowMemory:
    """The number of rows of each window so far, in a small file that may be lost without harm."""

    WORTH_SAVING = 1.0  # seconds of planning that a crash may lose; the file is rewritten only after so much,
    TIMES_WRITING = 50  # and after so many times what writing it took

    def __init__(self, path: Path | None, identity: dict[str, Any]):
        self._path = path
        self._identity = identity
        self._unsaved, self._worth_saving = 0.0, self.WORTH_SAVING
        self.counts = self._read()

    def add(self, rows: int, seconds: float) -> None:
        """Remembers the next window's rows, which took so long to find."""
        self.counts.append(rows)
        self._unsaved += seconds
        if self._path is not None and self._unsaved >= self._worth_saving:
            began = time.monotonic()
            self._write()
            self._unsaved = 0.0
            self._worth_saving = max(self.WORTH_SAVING, self.TIMES_WRITING * (time.monotonic() - began))

    def check(self, number: int, rows: int) -> None:
        """Raises InputError when the file said otherwise, since then the rows served so far were the wrong ones."""
        if self.counts[number] != rows:
            raise InputError(
                f"{self._path}: says that window {number} has {self.counts[number]} rows, and it has {rows}: the file "
                "was altered; delete it and start again from a checkpoint made before"
            )

    def _read(self) -> list[int]:
        if self._path is None or not self._path.exists():
            return []
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            counts = stored["rows"]
            if stored["identity"] == self._identity and stored["check"] == derive_key(counts):
                return counts
            reason = "it is of another plan, or damaged"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        _log.warning("%s: not used (%s); the rows of past windows are counted again", self._path, reason)
        return []

    def _write(self) -> None:
        stored = {"identity": self._identity, "check": derive_key(self.counts), "rows": self.counts}
        draft = self._path.with_name(f".{self._path.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(stored) + "\n", encoding="utf-8")
            os.replace(draft, self._path)
        except OSError as error:
            _log.warning("%s: cannot be written (%s); a resumed run will count rows again", self._path, error.strerror)
            self._path = None
