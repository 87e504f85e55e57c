"""Lines that are longer than the model takes, cut into pieces that fit: between sentences, or words, or anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tfm.data.corpus import single_line
from tfm.data.tokenizer import Tokenizer

# Chinese and Japanese put no blank after a full stop, but may close a quotation or a bracket.
_SENTENCE_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])(?![。！？」』”’）])\s*")


def cut(line: str, tokenizer: Tokenizer, room: int) -> Iterator[list[int]]:
    """Token ids of the pieces, each of at most `room` tokens; as few cuts as that allows. A tag is put before each.

    Where there is room for one token alone, it is not the tag.
    """
    line, tag = tokenizer.split_tag(single_line(line))
    first = [] if tag is None or room < 2 else [tag]
    room -= len(first)
    for unit in _units(_SENTENCE_ENDS.split(line), tokenizer, room):
        for at in range(0, len(unit), room):
            yield first + unit[at : at + room]


def _units(parts: list[str], tokenizer: Tokenizer, room: int) -> Iterator[list[int]]:
    """Neighbouring parts joined as long as they fit; a part that doesn't fit is cut into words, and a word in two.

    A word is cut as text: its ids may be bytes, and a character cut in two would be none.
    """
    joined: list[int] = []
    for part, ids in zip(parts, tokenizer.encode(parts), strict=True):
        if joined and len(joined) + len(ids) > room:
            yield joined
            joined = []
        words = part.split()
        if len(words) == 1:
            words = [part[: len(part) // 2], part[len(part) // 2 :]]
        if len(ids) > room and all(words):
            yield from _units(words, tokenizer, room)
        else:
            joined = joined + ids
    if joined:
        yield joined
