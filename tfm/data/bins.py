"""Packing one window of pairs into rows: bins with two capacities, source tokens and target tokens.

Pairs of equal lengths are interchangeable, so most of the work is done on counts. First every row is filled at random
up to where about two pairs have room; the rest is then chosen: for all rows with the same room at once, the two kinds
of pair that fill it best. Rows keep their random mixture of lengths that way, and yet are full.
The idea of packing on the histogram of lengths is that of Krell et al., 2021, "Efficient Sequence Packing without
Cross-contamination", there with one capacity.
"""

from __future__ import annotations

import heapq

import numpy as np

_UNITS = 32  # lengths are counted in units, so that the mean has at most twice so many and the tables below stay small
_ROOM = (22, 10)  # room left by the random part, in mean pairs (2.2), as numerator and denominator
_CHOICE = (26, 10)  # room up to which the best two kinds are looked for; above, the longest that fits is placed


def pack(source: np.ndarray, target: np.ndarray, source_row: int, target_row: int) -> tuple[np.ndarray, int]:
    """The row of each pair (int32 [pairs]) and the number of rows, none of which is empty.

    Args:
      source, target: tokens of each pair, int [pairs], in random order; each at least 1 and at most its row's length.
      source_row, target_row: tokens in a row.
    """
    if not len(source):
        return np.zeros(0, np.int32), 0
    source, source_room = _in_units(source, source_row)
    target, target_room = _in_units(target, target_row)
    return _Packing(source, target, source_room, target_room).run()


def _in_units(lengths: np.ndarray, row: int) -> tuple[np.ndarray, int]:
    unit = max(1, int(lengths.sum(dtype=np.int64)) // len(lengths) // _UNITS)
    # A pair as long as the row may round up to one unit too many; it takes the row for itself, and does fit.
    return np.minimum(-(-lengths // unit), row // unit).astype(np.int32), row // unit


class _Packing:
    """The state of packing one window. Pairs of a kind have equal lengths; a size is a weighted sum of both lengths."""

    def __init__(self, source: np.ndarray, target: np.ndarray, source_room: int, target_room: int):
        self.source, self.target = source, target
        self.source_room, self.target_room = source_room, target_room
        pairs, total_s, total_t = len(source), int(source.sum(dtype=np.int64)), int(target.sum(dtype=np.int64))
        self.row_of = np.full(pairs, -1, np.int32)
        self.rows = max(-(-total_s // source_room), -(-total_t // target_room))  # fewer cannot hold the tokens
        self.mean_s, self.mean_t = -(-total_s // pairs), -(-total_t // pairs)
        # The side that needs more rows decides how many there are, so its leftovers weigh more.
        load_s, load_t = total_s * target_room, total_t * source_room
        share_s, share_t = (load * 64 // max(load_s, load_t) for load in (load_s, load_t))
        self.weight_s = max(1, share_s**4 * target_room // 64**3)
        self.weight_t = max(1, share_t**4 * source_room // 64**3)

    def run(self) -> tuple[np.ndarray, int]:
        room_s, room_t = self._fill_at_random()
        self._gather_kinds()
        self._rows_by_room(room_s, room_t)
        self._best = None
        while self.unplaced:
            if not self.open:  # what is left over starts new rows, at most as many as it must
                left_s, left_t = int((self.kind_s * self.left).sum()), int((self.kind_t * self.left).sum())
                more = max(1, min(left_s // self.source_room, left_t // self.target_room))
                self._push(self.source_room, self.target_room, np.arange(self.rows, self.rows + more, dtype=np.int32))
                self.rows += more
            _, room, _, rows = heapq.heappop(self.open)
            room_s, room_t = divmod(room, self.target_room + 1)
            if room_s > self.choice_s or room_t > self.choice_t:
                self._place_longest(room_s, room_t, rows)
            else:
                self._place_best_two(room_s, room_t, rows)
        return self.row_of, self.rows

    def _fill_at_random(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives each row one more pair, in the pairs' order, for as long as it has room; returns the room left."""
        room_s = np.full(self.rows, self.source_room, np.int32)
        room_t = np.full(self.rows, self.target_room, np.int32)
        spare_s, spare_t = (mean * _ROOM[0] // _ROOM[1] for mean in (self.mean_s, self.mean_t))
        # A pair longer than the room that will be left must come first, or only a new row could take it.
        long = (self.source > spare_s) | (self.target > spare_t)
        first = np.flatnonzero(long)
        if len(first) > self.rows or self.source_room <= 3 * self.mean_s or self.target_room <= 3 * self.mean_t:
            return room_s, room_t
        self.row_of[first] = np.arange(len(first))
        room_s[: len(first)] -= self.source[first]
        room_t[: len(first)] -= self.target[first]
        rest = np.flatnonzero(~long)
        rows, start = np.arange(self.rows, dtype=np.int32), 0
        while True:
            rows = rows[(room_s[rows] >= spare_s + self.mean_s // 2) & (room_t[rows] >= spare_t + self.mean_t // 2)]
            if not len(rows) or start + len(rows) > len(rest):
                return room_s, room_t
            pairs = rest[start : start + len(rows)]
            start += len(rows)
            after_s, after_t = room_s[rows] - self.source[pairs], room_t[rows] - self.target[pairs]
            fits = (after_s >= spare_s) & (after_t >= spare_t)
            rows, pairs = rows[fits], pairs[fits]
            self.row_of[pairs], room_s[rows], room_t[rows] = rows, after_s[fits], after_t[fits]

    def _gather_kinds(self) -> None:
        """Sorts the pairs without a row by kind, largest first: `left` of each, of which `members[next:]` remain."""
        members = np.flatnonzero(self.row_of < 0)
        size = self.source[members] * np.int64(self.weight_s) + self.target[members] * np.int64(self.weight_t)
        code = self.source[members] * np.int64(self.target_room + 1) + self.target[members]
        by_code = np.argsort(code, kind="stable")
        _, starts, counts = np.unique(code[by_code], return_index=True, return_counts=True)
        order = np.argsort(-size[by_code[starts]], kind="stable")
        self.members = members[by_code]
        self.next, self.left = starts[order], counts[order]
        example = self.members[self.next]
        self.kind_s, self.kind_t, self.size = self.source[example], self.target[example], size[by_code[starts[order]]]
        self.unplaced = len(members)
        self.choice_s = min(self.source_room, self.mean_s * _CHOICE[0] // _CHOICE[1])
        self.choice_t = min(self.target_room, self.mean_t * _CHOICE[0] // _CHOICE[1])

    def _rows_by_room(self, room_s: np.ndarray, room_t: np.ndarray) -> None:
        """The heap of open rows: (minus the room's size, room, a serial number, the rows that have just that room)."""
        self.open, self._serial = [], 0
        code = room_s.astype(np.int64) * (self.target_room + 1) + room_t
        rows = np.argsort(code, kind="stable").astype(np.int32)
        for group in np.split(rows, np.flatnonzero(np.diff(code[rows])) + 1):
            self._push(int(room_s[group[0]]), int(room_t[group[0]]), group)

    def _push(self, room_s: int, room_t: int, rows: np.ndarray) -> None:
        size = room_s * self.weight_s + room_t * self.weight_t
        self._serial += 1
        heapq.heappush(self.open, (-size, room_s * (self.target_room + 1) + room_t, self._serial, rows))

    def _place(self, kind: int, rows: np.ndarray) -> None:
        start, count = int(self.next[kind]), len(rows)
        self.row_of[self.members[start : start + count]] = rows
        self.next[kind] += count
        self.left[kind] -= count
        self.unplaced -= count
        if not self.left[kind]:
            self._best = None

    def _place_longest(self, room_s: int, room_t: int, rows: np.ndarray) -> None:
        fits = (self.kind_s <= room_s) & (self.kind_t <= room_t) & (self.left > 0)
        kind = int(fits.argmax())
        if not fits[kind]:
            return
        count = min(len(rows), int(self.left[kind]))
        self._place(kind, rows[:count])
        self._push(room_s - int(self.kind_s[kind]), room_t - int(self.kind_t[kind]), rows[:count])
        if count < len(rows):
            self._push(room_s, room_t, rows[count:])

    def _place_best_two(self, room_s: int, room_t: int, rows: np.ndarray) -> None:
        """Of every kind that fits, with the best kind beside it, places the two that fill most, till no row is left."""
        kinds = len(self.size)
        while len(rows):
            if self._best is None:
                self._find_best()
            beside_s, beside_t = room_s - self.live_s, room_t - self.live_t
            fits = np.flatnonzero((beside_s >= 0) & (beside_t >= 0))
            if not len(fits):
                return
            second = self._best[beside_s[fits], beside_t[fits]]
            top = int((self.live_size[fits] + second // kinds).argmax())  # the first of equals is the longest
            one, two = int(self.live[fits[top]]), kinds - 1 - int(second[top]) % kinds if second[top] else None
            count = min(len(rows), int(self.left[one]))
            if two == one and count > 1:
                count = min(count, int(self.left[one]) // 2)
            elif two == one:
                two = None if self.left[one] < 2 else two
            elif two is not None:
                count = min(count, int(self.left[two]))
            after_s, after_t = room_s, room_t
            for kind in (one, two):
                if kind is not None:
                    self._place(kind, rows[:count])
                    after_s, after_t = after_s - int(self.kind_s[kind]), after_t - int(self.kind_t[kind])
            if after_s and after_t:
                self._push(after_s, after_t, rows[:count])
            rows = rows[count:]

    def _find_best(self) -> None:
        """The best kind for every room up to the choice's: size * kinds + (kinds - 1 - kind), 0 for none."""
        kinds = len(self.size)
        self.live = np.flatnonzero((self.left > 0) & (self.kind_s <= self.choice_s) & (self.kind_t <= self.choice_t))
        self.live_s, self.live_t, self.live_size = self.kind_s[self.live], self.kind_t[self.live], self.size[self.live]
        best = np.zeros((self.choice_s + 1, self.choice_t + 1), np.int64)
        best[self.live_s, self.live_t] = self.live_size * kinds + (kinds - 1 - self.live)
        self._best = np.maximum.accumulate(np.maximum.accumulate(best, axis=0), axis=1)
