"""Long lines in pieces: none too long, none needlessly short, no character lost."""

import random

import pytest

from tfm.data.tokenizer import Tokenizer, train_tokenizer
from tfm.decoding.cutting import cut

WORDS = ["haus", "tür", "baum", "weg", "see", "alt", "groß", "läuft"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=5)) + "." for _ in range(300)]
    return train_tokenizer(lines, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 320)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_fit_and_hold_all_that_the_line_holds(tokenizer, seed):
    generator = random.Random(seed)
    parts = [*WORDS, "x" * 90, "🙂" * 20, ".", "! ", "?", "…", "。", "\u00a0", "  "]
    line = "".join(generator.choice(parts) + generator.choice(["", " "]) for _ in range(generator.randint(1, 200)))
    room = generator.choice([7, 23, 60])
    pieces = list(cut(line, tokenizer, room))
    assert all(0 < len(piece) <= room for piece in pieces)
    text = "".join(tokenizer.decode(pieces))
    assert "".join(text.split()) == "".join(line.split())


def test_a_line_of_a_hundred_thousand_characters(tokenizer):
    line = "haus tür. " * 10_000
    pieces = list(cut(line, tokenizer, 50))
    texts = tokenizer.decode(pieces)
    assert all(text.endswith(".") for text in texts)  # between sentences
    assert " ".join(texts) == line.strip()
    assert sum(map(len, pieces)) / len(pieces) > 40


def test_sentences_without_blanks_get_none(tmp_path):
    """A piece has the tokens that its text has, as in training: no beginning of a word before each sentence."""
    tokenizer = train_tokenizer(["猫。犬。鳥。"] * 50, tmp_path / "tokenizer.model", 280)
    line = "猫。犬。鳥。" * 30
    pieces = list(cut(line, tokenizer, 20))
    texts = tokenizer.decode(pieces)
    assert len(texts) > 3 and "".join(texts) == line
    assert pieces == tokenizer.encode(texts)


@pytest.mark.parametrize(
    ("sentences", "between"),
    [
        (['Er sagte: "Das haus ist alt."', "(Der baum ist groß.)", "„Ein weg!“", "»Ein see?«", "Alt."], " "),
        (["「私は猫を見る。」", "『犬がいる！』」", "（鳥。）", "魚。"], ""),
    ],
)
def test_a_sentence_may_close_a_quotation_or_a_bracket_after_its_end(tmp_path, sentences, between):
    tokenizer = train_tokenizer(sentences * 20, tmp_path / "tokenizer.model", 300)
    line = between.join(sentences * 9)
    pieces = list(cut(line, tokenizer, 40))
    assert len(pieces) > 3
    for text in tokenizer.decode(pieces):
        assert text.endswith(tuple(sentences)) and text.startswith(tuple(sentences))


def test_a_tag_stands_before_every_piece(tmp_path):
    tokenizer = train_tokenizer(WORDS * 20, tmp_path / "tokenizer.model", 300, tags=["<2de>"])
    pieces = list(cut(" <2de> " + "haus tür. " * 30, tokenizer, 20))
    assert len(pieces) > 3 and all(piece[0] == tokenizer.tag_id("<2de>") and len(piece) <= 20 for piece in pieces)
    assert " ".join(tokenizer.decode([piece[1:] for piece in pieces])) == ("haus tür. " * 30).strip()
    alone = list(cut("<2de> haus", tokenizer, 1))  # no room for a tag and a token
    assert len(alone) >= 2 and all(len(piece) == 1 and piece[0] != tokenizer.tag_id("<2de>") for piece in alone)
