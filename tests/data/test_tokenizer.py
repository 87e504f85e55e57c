"""SentencePiece as it is trained and used here."""

import io
import itertools
import random

import numpy as np
import pytest
import sentencepiece

from tfm.config import InputError
from tfm.data.tokenizer import BOS, EOS, PAD, UNK, SentenceSample, Tokenizer, train_tokenizer

SYLLABLES = ["ba", "ko", "li", "mu", "ne", "ra", "so", "tü", "ße", "wi"]


def sentences(count: int = 2000) -> list[str]:
    generator = random.Random(0)
    word = lambda: "".join(generator.choices(SYLLABLES, k=generator.randint(1, 4)))  # noqa: E731
    return [" ".join(word() for _ in range(generator.randint(2, 9))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(sentences(), path, 500, tags=("<2de>", "<bt>"))


def test_special_ids(tokenizer):
    assert (PAD, EOS, BOS, UNK) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 500
    assert not {PAD, EOS, BOS, UNK} & set(itertools.chain.from_iterable(tokenizer.encode(sentences(50))))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_any_text_comes_back(tmp_path, model_type):
    tokenizer = train_tokenizer(sentences(), tmp_path / "m", 500, model_type=model_type)
    texts = [
        "bako litü.",
        "m² and ½, … “quoted” ﬁne",  # NFKC would change each of these
        "中文 Ελληνικά 🙂 e\u0301",  # of which training saw nothing
        "<s> </s> <unk> <pad> <0x41>",
        "",
    ]
    ids = tokenizer.encode(texts)
    assert tokenizer.decode(ids) == texts
    assert not any({PAD, EOS, BOS, UNK} & set(row) for row in ids)


def test_training_is_deterministic_and_written_whole(tmp_path, tokenizer):
    again = train_tokenizer(iter(sentences()), tmp_path / "tokenizer.model", 500, tags=("<bt>", "<2de>"))
    assert again.sha256 == tokenizer.sha256 == Tokenizer.load(tmp_path / "tokenizer.model").sha256
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_line_breaks_are_blanks_in_and_out(tokenizer):
    folded, plain = tokenizer.encode(["ba\r\nko\u2028li\tmu\0", "ba ko li mu"])
    assert folded == plain
    assert sorted(tokenizer.banned_ids)[:3] == [PAD, BOS, UNK]
    newline, carriage_return = sorted(tokenizer.banned_ids)[3:]
    assert (carriage_return - newline) == 3
    ba, ko = tokenizer.encode(["ba", "ko"])
    decoded = tokenizer.decode([[newline, *ba, newline, carriage_return, newline, *ko, newline]])[0]
    assert decoded.split(" ") == ["ba", "", "ko"]  # the break's blank, and the one that "ko" begins with
    u2028 = [newline - 0x0A + byte for byte in "\u2028".encode()]
    assert tokenizer.decode([[*ba, *u2028, *ko]])[0].split() == ["ba", "ko"]
    assert "\u2028" not in tokenizer.decode([[*ba, *u2028, *ko]])[0]


def test_invalid_bytes_become_the_replacement_character(tokenizer):
    newline = sorted(tokenizer.banned_ids)[3]
    lone = newline - 0x0A + 0xC3
    text = tokenizer.decode([[*tokenizer.encode(["ba"])[0], lone]])[0]
    assert text == "ba\ufffd"


def test_numpy_ids_are_decoded(tokenizer):
    ids = tokenizer.encode(["bako litü."])[0]
    assert tokenizer.decode([np.array(ids, np.uint16)]) == ["bako litü."]


def test_a_learned_piece_in_angle_brackets_is_no_tag(tmp_path):
    lines = [f"<1>{word}</1> {word}" for word in ("bako", "mu", "tela", "rin")] * 40
    tokenizer = train_tokenizer(lines, tmp_path / "tokenizer.model", 290)
    assert any(piece.strip("▁") in ("<1>", "</1>") for piece in tokenizer.pieces(range(tokenizer.vocab_size)))
    for line in ("<1>bako</1> mu", "</1>mu", "<1> tela"):
        assert tokenizer.split_tag(line) == (line, None)
        assert tokenizer.decode(tokenizer.encode([line])) == [line]


def test_tags(tokenizer):
    tagged, plain, inside = tokenizer.encode(["<2de> bako", "bako", "bako <2de>"])
    assert tagged == [tokenizer.tag_id("<2de>"), *plain]
    assert tokenizer.tag_id("<2de>") != tokenizer.tag_id("<bt>")
    assert tokenizer.tag_id("<2de>") in inside
    with pytest.raises(InputError, match="'<2fr>' is not in the tokenizer"):
        tokenizer.tag_id("<2fr>")


def test_control_symbols_in_text_are_text(tokenizer):
    rows = tokenizer.encode(["</s> bako", "<0x0A> bako"])
    assert tokenizer.decode(rows) == ["</s> bako", "<0x0A> bako"]
    assert not any(set(tokenizer.banned_ids) & set(row) or EOS in row for row in rows)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_vocabulary_is_lowered_to_what_the_corpus_bears(tmp_path, caplog, model_type):
    few = ["hallo welt", "hello world"]
    tokenizer = train_tokenizer(few, tmp_path / "m", 8000, model_type=model_type)
    assert 260 < tokenizer.vocab_size < 400
    assert f"data.vocab_size=8000 is more than this corpus can fill: the vocabulary has {tokenizer.vocab_size}" in (
        caplog.text
    )
    assert tokenizer.decode(tokenizer.encode(few)) == few


def test_vocabulary_without_room_for_the_characters_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.vocab_size=200 has no room .* more than (\d+)") as error:
        train_tokenizer(sentences(), tmp_path / "m", 200)
    least = int(str(error.value).rsplit(" ", 1)[1]) + 1
    assert train_tokenizer(sentences(), tmp_path / "m", least).vocab_size == least
    with pytest.raises(InputError, match="no tokenizer can be trained"):
        train_tokenizer(["", " "], tmp_path / "m", 500)


def test_long_lines_are_learnt_from(tmp_path):
    line = " ".join(
        f"xylo{syllable}" for syllable in SYLLABLES * 200
    )  # 14,000 bytes, and SentencePiece's own limit is 4,192
    tokenizer = train_tokenizer([line, *sentences(100)], tmp_path / "m", 400)
    assert len(tokenizer.encode(["xylo"])[0]) < 4


def test_foreign_tokenizer_is_refused(tmp_path):
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)), model_writer=output, vocab_size=60, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(output.getvalue())
    with pytest.raises(InputError, match=r"other\.model: its special ids .* --pad_id=0"):
        Tokenizer.load(tmp_path / "other.model")
    (tmp_path / "text.model").write_bytes(b"no model at all")
    with pytest.raises(InputError, match=r"text\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "text.model")
    with pytest.raises(InputError, match=r"none\.model: tokenizer cannot be read"):
        Tokenizer.load(tmp_path / "none.model")


def draw(limit: int, parts: list[tuple[range, float]], chunk: int) -> list[int]:
    sample = SentenceSample(limit)
    for numbers, weight in parts:
        for start in range(0, len(numbers), chunk):
            part = numbers[start : start + chunk]
            sample.add([(f"s{i}", f"t{i}") for i in part], weight)
    drawn = sample.sentences()
    assert drawn[1::2] == [text.replace("s", "t") for text in drawn[::2]]
    return [int(text[1:]) for text in drawn[::2]]


def test_sample_is_uniform_over_the_whole_corpus():
    drawn = draw(10_000, [(range(100_000), 1.0)], chunk=1000)
    assert len(drawn) == len(set(drawn)) == 5000 and drawn == sorted(drawn)
    tenths = np.bincount(np.array(drawn) // 10_000, minlength=10)
    assert tenths.min() > 420 and tenths.max() < 580  # 500 each, standard deviation 21
    assert draw(10_000, [(range(100_000), 1.0)], chunk=777) == drawn


def test_sample_follows_the_weights_and_keeps_a_small_corpus_whole():
    drawn = np.array(draw(4000, [(range(20_000), 1.0), (range(20_000, 40_000), 3.0)], chunk=1000))
    assert 0.70 < (drawn >= 20_000).mean() < 0.80
    assert draw(4000, [(range(1500), 0.5)], chunk=1000) == list(range(1500))
