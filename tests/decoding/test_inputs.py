"""What is no list of texts is refused, and by the number of the line; as `Translator` says it, in its own tests."""

import itertools
from collections.abc import Sequence

import pytest

from tfm.config import InputError
from tfm.decoding.inputs import checked, in_step, several


@pytest.mark.parametrize("one", ["red blue", b"red"])
def test_one_text_is_not_taken_for_several(one):
    lines = ["red", "blue"]
    assert several(lines, "lines") is lines
    with pytest.raises(TypeError, match=f"lines: expected several, such as a list, and got one {type(one).__name__}"):
        several(one, "lines")


def test_what_is_no_text_is_refused_where_it_stands_and_not_before():
    lines = checked(["red", "", None], "line", first=7)
    assert [next(lines), next(lines)] == ["red", ""]
    with pytest.raises(TypeError, match="line 9: expected text, and got NoneType"):
        next(lines)
    with pytest.raises(TypeError, match="target 1: expected text, and got bytes"):
        next(checked([b"red"], "target", kinds=str | Sequence))
    assert list(checked(["red", ["r", "ed"]], "target", kinds=str | list)) == ["red", ["r", "ed"]]


@pytest.mark.parametrize(("lines", "others", "what"), [("ab", "a", "fewer"), ("a", "ab", "more"), ("", "a", "more")])
def test_of_two_sides_neither_may_have_more(lines, others, what):
    both = min(len(lines), len(others))
    pairs = in_step(lines, others, "prefixes", first=1)
    assert list(itertools.islice(pairs, both)) == [("a", "a")] * both
    with pytest.raises(InputError, match=f"there are {what} prefixes than lines: {both} of both"):
        next(pairs)


def test_what_is_as_long_ends_together_even_with_nothing_in_it():
    assert list(in_step([None, ""], ["", None], "prefixes", first=1)) == [(None, ""), ("", None)]
    assert list(in_step([], [], "prefixes", first=1)) == []
