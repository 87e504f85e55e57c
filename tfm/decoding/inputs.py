"""What is handed over to be translated: texts, several of them, and as many of one kind as of the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from types import UnionType
from typing import Any

from tfm.config import InputError

_NONE_LEFT = object()


def several(lines: Iterable[Any], what: str) -> Iterable[Any]:
    """The lines. Raises TypeError at a single text, of which each character would be taken for one of them."""
    if isinstance(lines, str | bytes):
        raise TypeError(f"{what}: expected several, such as a list, and got one {type(lines).__name__}: write [...]")
    return lines


def checked(lines: Iterable[Any], what: str, first: int = 1, kinds: type | UnionType = str) -> Iterator[Any]:
    """The lines, counted from `first`. Raises TypeError at one that is none of `kinds`."""
    for number, line in enumerate(lines, first):
        if isinstance(line, bytes) or not isinstance(line, kinds):  # bytes are a sequence, of numbers
            raise TypeError(f"{what} {number}: expected text, and got {type(line).__name__}")
        yield line


def in_step(lines: Iterable[Any], others: Iterable[Any], what: str, first: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of lines, counted from `first`.

    Raises InputError where one side has more; `what` names the others.
    """
    for number, (line, other) in enumerate(zip_longest(lines, others, fillvalue=_NONE_LEFT), first):
        if line is _NONE_LEFT or other is _NONE_LEFT:
            more = "more" if line is _NONE_LEFT else "fewer"
            raise InputError(f"there are {more} {what} than lines: {number - 1} of both")
        yield line, other
