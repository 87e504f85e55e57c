"""Lines in, lines out: what the translator itself does, with an echo for a model."""

import dataclasses
import itertools
import logging
import operator
import queue

import jax
import numpy as np
import pytest

from tests.decoding.lines import CONFIG, MODEL_CONFIG, ODD_LINES, WORDS, sentences
from tfm.config import InputError, MeshConfig
from tfm.data.tokenizer import EOS
from tfm.decoding import translator as module
from tfm.decoding.decoder import Bucket, bucket_of
from tfm.decoding.search import Hypotheses
from tfm.decoding.translation import Hypothesis, Translation
from tfm.decoding.translator import Translator
from tfm.model.transformer import Transformer
from tfm.sharding import make_mesh

EMPTY = Translation((Hypothesis("", (), 0.0, 0.0),))


class Echo:
    """A decoder that says what it is given, with 1 nat lost a token, and keeps what it was given."""

    def __init__(self, source_lengths=(8, 24), rows: int = 3):
        self.buckets = [Bucket(rows, length, length) for length in source_lengths]
        self.long_buckets = [Bucket(1, length, 2 * length) for length in source_lengths]
        self.given_up: set[int] = set()  # lengths of sentences that are, at first
        self.batches: list[tuple[Bucket, list[list[int]]]] = []
        self.asked: list[tuple[list[int], list[int] | None, tuple[int, int]]] = []  # sentence, prefix, draw

    def decode(self, bucket: Bucket, given, prefixes, numbers) -> Hypotheses:
        self.batches.append((bucket, list(given)))
        assert len(given) == len(numbers) <= bucket.rows
        self.asked += zip(given, prefixes or [None] * len(given), numbers, strict=True)
        tokens = np.full((bucket.rows, 1, bucket.length), EOS)
        lengths = np.zeros((bucket.rows, 1), np.int32)
        for row, sentence in enumerate(given):
            assert sentence[-1] == EOS and EOS not in sentence[:-1]
            tokens[row, 0, : len(sentence)] = sentence
            lengths[row] = len(sentence) - 1
        is_whole = np.array(
            [length + 1 not in self.given_up or bucket in self.long_buckets for length in lengths[:, 0]]
        )
        return Hypotheses(tokens, lengths, -lengths.astype(np.float32), is_whole)


@pytest.fixture
def echo(tokenizer) -> Translator:
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    translator = Translator([model], make_mesh(MeshConfig(), jax.devices()[:1]), tokenizer, CONFIG)
    translator.decoder = Echo()
    return translator


def single_spaced(text: str) -> str:
    return " ".join(text.split())


def test_each_line_gets_its_own_translation_in_order(echo):
    lines = sentences(40) + ODD_LINES[:5] + sentences(40, seed=1)
    found = echo.translate(lines)
    assert [t.text for t in found] == [single_spaced(line) for line in lines]
    expected = [-float(len(ids)) for ids in echo.tokenizer.encode(lines)]
    assert [t.log_prob for t in found] == expected


def test_one_line_out_for_each_line_in_whatever_it_holds(echo):
    found = echo.translate(ODD_LINES)
    assert len(found) == len(ODD_LINES)
    assert all(len(t.text.splitlines()) <= 1 for t in found)
    for line, translation in zip(ODD_LINES, found, strict=True):
        if not line.strip():
            assert translation == EMPTY
    assert found[0] == found[10]
    assert found[5].text == "weg see alt und"


def test_nothing_is_decoded_for_empty_lines(echo):
    assert echo.translate(["", " ", "\n"]) == [EMPTY] * 3
    assert echo.translate([]) == []
    assert echo.decoder.batches == []


def test_a_bucket_holds_a_line_by_its_own_length_alone(echo):
    echo.translate(sentences(50))
    lengths = {bucket: {len(s) for _, batch in group for s in batch} for bucket, group in grouped(echo.decoder.batches)}
    assert len(lengths) == 2
    for bucket, found in lengths.items():
        assert found == {n for n in found if bucket == bucket_of(echo.decoder.buckets, n)}
    for bucket, group in grouped(echo.decoder.batches):  # all but the last batch of a bucket are full
        assert all(len(batch) == bucket.rows for _, batch in list(group)[:-1])


def grouped(batches):
    bucket = operator.itemgetter(0)
    return [(key, list(group)) for key, group in itertools.groupby(sorted(batches, key=bucket), key=bucket)]


def test_a_long_line_is_cut_between_sentences_and_joined_again(echo, caplog):
    long = " ".join(sentences(12))
    with caplog.at_level(logging.WARNING):
        found = echo.translate(["haus", long, "tür", long])
    assert [t.text for t in found] == ["haus", long, "tür", long]
    ids = echo.tokenizer.encode([long])[0]
    assert len(caplog.messages) == 2
    expected = f"line 2 has {len(ids) + 1} tokens, end included, more than decoding.max_source_length=24"
    assert caplog.messages[0].startswith(expected)
    assert caplog.messages[1].startswith("line 4 has")
    pieces = [echo.tokenizer.decode([s[:-1]])[0] for _, batch in echo.decoder.batches for s in batch]
    assert all(piece.endswith(".") for piece in pieces if piece not in ("haus", "tür"))
    assert found[1].log_prob == -float(len(ids))  # of all pieces together


@pytest.mark.parametrize(
    "long",
    [
        " ".join(WORDS * 8),  # one sentence: cut between words
        "haus. " + " ".join(WORDS * 5) + ". tür. " + "Haus! " * 30 + "Baum? weg…",
        "haus " + "x" * 150 + " tür. " + "🙂" * 40,  # a word that does not fit: cut anywhere
        "  haus.   " * 30,
        "。".join(["haus"] * 30),
    ],
)
def test_no_character_of_a_long_line_is_lost(echo, long):
    (found,) = echo.translate([long])
    assert found.text.replace(" ", "") == long.replace(" ", "")
    assert "\ufffd" not in found.text  # that is: no character was cut in two
    if "x" not in long:
        assert found.text == single_spaced(long)
    lengths = [len(s) for _, batch in echo.decoder.batches for s in batch]
    assert max(lengths) <= CONFIG.max_source_length
    assert len(lengths) > 1 and sum(lengths) / len(lengths) > CONFIG.max_source_length / 3  # no needless cuts


def test_the_longest_line_that_fits_is_left_whole(echo, caplog):
    fits = next(
        text
        for text in (" ".join((WORDS * 3)[:n]) + "x" * m for n in range(1, 31) for m in range(3))
        if len(echo.tokenizer.encode([text])[0]) == CONFIG.max_source_length - 1
    )
    with caplog.at_level(logging.WARNING):
        assert echo.translate([fits])[0].text == fits
        assert not caplog.messages
        echo.translate([fits + " haus"])
        assert len(caplog.messages) == 1


def test_a_stream_is_read_a_window_at_a_time_and_lines_are_counted_on(echo, monkeypatch, caplog):
    monkeypatch.setattr(echo, "_window_lines", 4)
    long = " ".join(WORDS * 4)
    taken = []

    def endless():
        for number in itertools.count(1):
            taken.append(number)
            yield long if number == 6 else f"haus {'tür ' * (number % 3)}"

    found = []
    with caplog.at_level(logging.WARNING):
        for window in echo.windows(endless(), first=101):
            assert 0 < len(window) <= 4
            found += window
            assert len(taken) <= len(found) + 3 * 4 + 1  # one window begun, one in the queue, and a line being read
            if len(found) >= 8:
                break
    assert found[5].text == long and found[0].text == "haus tür"
    assert [m.split(" has")[0] for m in caplog.messages] == ["line 106"]


def test_a_window_fills_the_largest_batches(tokenizer, monkeypatch):
    """Sixteen of the shortest sentences', however many devices these are for, and never fewer lines than 8,192."""
    monkeypatch.setattr(module, "patience", lambda: None)  # this machine may be busy
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    for tokens, lines in ((4096, 8192), (2**16, 2**16)):
        config = dataclasses.replace(CONFIG, tokens_per_batch=tokens)
        translator = Translator([model], make_mesh(MeshConfig(), jax.devices()[:1]), tokenizer, config)
        translator.decoder = Echo()
        assert len(next(translator.windows("" for _ in range(lines + 5)))) == lines


def test_a_slow_stream_is_answered_line_by_line(echo):
    """Each line is only said once the one before has been answered, as someone at a terminal does."""
    answers: queue.Queue[str] = queue.Queue()

    def lines():
        for line in ("haus", "tür", "baum"):
            yield line
            assert answers.get(timeout=10) == line

    for window in echo.windows(lines()):
        for translation in window:
            answers.put(translation.text)
    assert answers.empty()


def test_an_error_of_the_stream_comes_after_what_was_there(echo):
    def lines():
        yield "haus"
        raise OSError("unplugged")

    found = []
    with pytest.raises(OSError, match="unplugged"):
        for window in echo.windows(lines()):
            found += window
    assert [t.text for t in found] == ["haus"]


def test_batches_are_of_sentences_of_like_length(echo):
    """So that none waits long for the others to end."""
    echo.decoder = Echo(rows=4)
    echo.translate(sentences(64, most=5))
    for _, group in grouped(echo.decoder.batches):
        sizes = [[len(s) for s in batch] for _, batch in group]
        assert list(itertools.chain(*sizes)) == sorted(itertools.chain(*sizes))


def test_what_is_given_up_is_decoded_anew_with_more_room(echo):
    lines = sentences(30)
    expected = echo.translate(lines)
    again = [ids for ids in echo.tokenizer.encode(lines) if len(ids) + 1 in (5, 9)]
    assert again
    echo.decoder = Echo()
    echo.decoder.given_up = {5, 9}
    assert echo.translate(lines) == expected
    long = [s[:-1] for bucket, batch in echo.decoder.batches if bucket in echo.decoder.long_buckets for s in batch]
    assert sorted(long) == sorted(again)
    assert echo.statistics.again == len(again)


def test_prefixes_and_lines_go_together(echo):
    with pytest.raises(InputError, match="there are fewer prefixes than lines: 1 of both"):
        echo.translate(["haus", "tür"], ["x"])
    with pytest.raises(InputError, match=r"line 2: its prefix has \d+ tokens, and its translation may have 5"):
        echo.translate(["haus", "tür"], ["", "haus " * 40])


def test_each_line_has_its_own_prefix_and_draw_and_a_cut_one_a_draw_for_each_piece(echo):
    long = " ".join(sentences(12))
    lines, prefixes = ["haus", "", long, "tür", "see"], ["alt", "und", "weg", "", "baum"]
    for given in (prefixes, None):
        echo.decoder = Echo()
        list(echo.windows(lines, given, first=101))
        pieces = sum(number == 103 for _, _, (number, _) in echo.decoder.asked)
        assert pieces > 1
        numbers = [(101, 0), *((103, piece) for piece in range(pieces)), (104, 0), (105, 0)]
        asked = {draw: (echo.tokenizer.decode([ids[:-1]])[0], prefix) for ids, prefix, draw in echo.decoder.asked}
        assert sorted(asked) == numbers
        assert [asked[number, 0][0] for number in (101, 104, 105)] == ["haus", "tür", "see"]
        assert " ".join(asked[103, piece][0] for piece in range(pieces)) == long
        words = {(101, 0): "alt", (103, 0): "weg", (105, 0): "baum"} if given else {}
        expected = {draw: echo.tokenizer.encode([words.get(draw, "")])[0] if given else None for draw in asked}
        assert {draw: prefix for draw, (_, prefix) in asked.items()} == expected


def test_what_stands_before_a_refused_prefix_is_translated(echo):
    found = []
    with pytest.raises(InputError, match="line 3: its prefix has"):
        for window in echo.windows(["haus", "tür", "weg", "see"], ["", "", "haus " * 40, ""]):
            found += window
    assert [translation.text for translation in found] == ["haus", "tür"]


def test_what_was_done_is_counted(echo):
    echo.decoder = Echo(rows=4)
    echo.translate(["haus", "", "tür baum", " ".join(sentences(12))])
    done = echo.statistics
    batches = echo.decoder.batches
    assert done.lines == 4 and done.sentences == sum(len(batch) for _, batch in batches) > 3
    assert done.source_tokens == sum(len(s) for _, batch in batches for s in batch)
    assert done.target_tokens == done.source_tokens - done.sentences  # an echo has no end symbol
    padded = sum(bucket.rows * bucket.length for bucket, _ in batches)
    assert done.padding == pytest.approx(1 - done.source_tokens / padded)


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (["a b.", "c", "", "d"], "a b. c d"),
        (["点击。", "这里。"], "点击。这里。"),
        (["여기를", "누르세요"], "여기를 누르세요"),
        (["Guten Tag 🙂", "Wie geht es?", "👍🏽", "Gut."], "Guten Tag 🙂 Wie geht es? 👍🏽 Gut."),
        (["", ""], ""),
    ],
)
def test_pieces_are_joined_as_their_script_is_written(texts, whole):
    pieces = [[Hypothesis(text, (text,), -1.0, -1.0)] for text in texts]
    (joined,) = module._joined(pieces)
    assert (joined.text, joined.log_prob) == (whole, -float(len(texts)))
