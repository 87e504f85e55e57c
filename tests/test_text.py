"""Tables line up, and a name that is nearly right is recognised."""

import math

from tfm.text import aligned, finite, near

ROWS = [("name", "number", "note"), ("a", "1,000", ""), ("longer", "2", "odd")]


def test_columns_begin_at_their_left_edge_or_end_at_their_right():
    assert aligned(ROWS, left=1) == "name    number  note\na        1,000\nlonger       2   odd"


def test_a_table_of_words_alone_has_nothing_behind_its_lines():
    assert aligned(ROWS, left=3) == "name    number  note\na       1,000\nlonger  2       odd"


def test_a_name_is_told_from_those_that_are_known():
    known = ("training.steps", "training.seed", "batch")
    assert near("steps", known, prefix="--") == "; did you mean --training.steps?"  # the section is missing
    assert near("bacth", known) == "; did you mean batch?"
    assert (near("colour", known), near("colour", known, otherwise="; see --help")) == ("", "; see --help")


def test_numbers_that_json_has_not_are_null():
    assert finite({"a": [1, math.nan, (2.5, math.inf)], "b": "nan"}) == {"a": [1, None, [2.5, None]], "b": "nan"}
