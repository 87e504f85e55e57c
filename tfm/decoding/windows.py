"""A stream of lines in windows: as many as are there, read ahead by a thread, never waited for while one can work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tfm import hosts

T = TypeVar("T")

_LINES = 8192
_BATCHES = 16

# Seconds in which so many items have to be there, once the first of them is. Reading a file takes far less, and
# translating a window far more; of a slow stream, what it gave in that time is translated.
PATIENCE = 0.1
_NAP = 0.5


def window_lines(rows: int) -> int:
    """Lines that are sorted into buckets together: enough to fill batches of so many rows, but for a few in a hundred.

    No more than three times as many are ever held.
    """
    return max(_LINES, _BATCHES * rows)


class Windows(Generic[T]):
    """Windows of at most `size` items of a stream, of which at most two windows are held. Close it when done.

    An exception of the stream is raised by the first waiting `take` after all the items before it. With a `patience`
    of None every window is filled, however long that takes, so that windows depend on the stream alone.
    """

    def __init__(self, items: Iterable[T], size: int, patience: float | None = PATIENCE):
        self._patience = patience
        self._ended = False
        self._size = size
        self._queue: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(size)
        self._error: BaseException | None = None
        self._closed = False
        threading.Thread(target=self._read, args=(iter(items),), daemon=True, name="reader").start()

    def _read(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put((item,))
                if self._closed:
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[T] | BaseException | None) -> None:
        while not self._closed:
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    @property
    def ended(self) -> bool:
        """Has everything been taken?"""
        return self._ended and self._error is None

    def take(self, wait: bool) -> list[T]:
        """The items that are there, in their order; waits for the first of them if asked to. Empty at the end, too."""
        taken: list[T] = []
        since = 0.0
        while len(taken) < self._size and not self._ended:
            try:
                if taken and self._patience is not None:
                    left = self._patience * (1 + len(taken) // _LINES) - (time.monotonic() - since)
                    item = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
                else:
                    item = self._waited_for() if wait or self._patience is None else self._queue.get_nowait()
                    since = time.monotonic()
            except queue.Empty:
                break
            if isinstance(item, tuple):
                taken.append(item[0])
            else:
                self._ended, self._error = True, item
        if wait and not taken and self._error is not None:
            error, self._error = self._error, None
            raise error
        return taken

    def _waited_for(self) -> tuple[T] | BaseException | None:
        """The next item, however long it takes.

        Wakes now and then: Python would notice a Ctrl-C that came just before it began to wait only at the wait's end.
        """
        while True:
            try:
                return self._queue.get(timeout=_NAP)
            except queue.Empty:
                continue

    def close(self) -> None:
        """Lets the thread end with the item that it is reading."""
        self._closed = True


def patience() -> float | None:
    """`PATIENCE` on one host. Several translate one batch together, so each has to make the same ones of a stream."""
    return PATIENCE if hosts.count() == 1 else None
