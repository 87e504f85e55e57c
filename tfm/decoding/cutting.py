"""Lines that are longer than the model takes, cut into pieces that fit: between sentences, or words, or anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tfm.data.corpus import single_line
from tfm.data.tokenizer import Tokenizer

# What divides is the group: a quotation or a bracket may close before it. Chinese and Japanese put no blank there.
_SENTENCE_ENDS = re.compile(r"""[.!?…]["'“”‘’«»‹›)\]]*(\s+)|[。！？][。！？」』”’）】》〉]*(\s*)""")
_BLANKS = re.compile(r"(\s+)")


def cut(line: str, tokenizer: Tokenizer, room: int) -> Iterator[list[int]]:
    """Token ids of the pieces, each of at most `room` tokens; a sentence that fits is not cut.

    A tag is put before each piece. Where there is room for one token alone, it is not the tag.
    """
    line, tag = tokenizer.split_tag(single_line(line))
    first = [] if tag is None or room < 2 else [tag]
    room -= len(first)
    for unit in _units(line, _between(_SENTENCE_ENDS, line, 0, len(line)), tokenizer, room):
        for at in range(0, len(unit), room):
            yield first + unit[at : at + room]


def _units(line: str, spans: list[tuple[int, int]], tokenizer: Tokenizer, room: int) -> Iterator[list[int]]:
    """Neighbouring spans joined as long as they fit; one that doesn't fit is cut into words, and a word in two.

    A word is cut as text: its ids may be bytes, and a character cut in two would be none.
    """
    joined: list[int] = []
    begin = end = 0
    for (start, stop), ids in zip(spans, tokenizer.encode([line[a:b] for a, b in spans]), strict=True):
        # As one text with what stands before it, where no blank divides them: by itself it would begin with one.
        together = tokenizer.encode([line[begin:stop]])[0] if joined and start == end else joined + ids
        if joined and max(len(ids), len(together)) > room:
            yield joined
            joined, together = [], ids
        words = _between(_BLANKS, line, start, stop)
        if len(words) == 1:
            (start, stop), middle = words[0], sum(words[0]) // 2
            words = [(start, middle), (middle, stop)]
        if len(ids) > room and all(a < b for a, b in words):
            yield from _units(line, words, tokenizer, room)
        elif ids:
            begin, end = begin if joined else start, stop
            joined = together
    if joined:
        yield joined


def _between(separator: re.Pattern[str], line: str, start: int, stop: int) -> list[tuple[int, int]]:
    """The spans of a stretch of a line that separators divide, without those that are empty."""
    found = separator.finditer(line, start, stop)
    edges = [start, *(edge for one in found for edge in one.span(one.lastindex or 0)), stop]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
