"""What a store is built of: segmentations, mixtures, tags, the text of validation; and corpora of which none can be."""

import dataclasses
import os

import numpy as np
import pytest

from tests.data.stores import config, source_lengths, texts, write_corpus
from tfm.config import Config, InputError
from tfm.data import checks, store_builder
from tfm.data.store import prepare
from tfm.data.tokenizer import EOS


@pytest.mark.parametrize(("model", "alpha"), [("unigram", 0.02), ("bpe", 0.3)])
def test_segmentations_spell_the_same_text_in_training_alone(tmp_path, corpus, model, alpha):
    fields = dict(segmentations=4, segmentation_alpha=alpha, tokenizer_model=model)
    store = prepare(config(corpus, options=";tag=<2de>", **fields), tmp_path / "a")
    pairs = write_corpus(tmp_path / "again", "train", range(1000, 1600))
    assert texts(store, "train") == [("<2de> " + source, target) for source, target in pairs] * 4
    assert texts(store, "validation") == [
        ("<2de> " + source, target) for source, target in write_corpus(tmp_path / "again", "val", range(1600, 1640))
    ]
    rows = store.tables("train")[0]
    versions = [[tuple(map(tuple, rows.pair(600 * v + i))) for i in range(600)] for v in range(4)]
    tag = store.tokenizer.tag_id("<2de>")
    for (source, target), best in zip(pairs, versions[0], strict=True):
        ids = store.tokenizer.encode([source, target])
        assert best == ((tag, *ids[0], EOS), (*ids[1], EOS))
    for v in range(1, 4):
        others = sum(versions[v][i] != versions[0][i] for i in range(600))
        assert others > 100
        assert sum(versions[v][i] != versions[v - 1][i] for i in range(600)) > 100
    assert store.report.splits[0].stored == 600
    again = prepare(config(corpus, options=";tag=<2de>", **fields), tmp_path / "b")
    assert again.corpus_hash == store.corpus_hash


def test_segmentation_too_long_for_a_row_gives_way_to_the_best(tmp_path, corpus):
    best = prepare(config(corpus), tmp_path / "a").tables("train")[0]
    row = int(max(source_lengths(best).max(), best.lengths("target", np.arange(600)).max()))
    lengths = dict(source_row_length=row, target_row_length=row)
    rows = prepare(config(corpus, segmentations=3, segmentation_alpha=0.01, **lengths), tmp_path / "b").tables("train")[
        0
    ]
    assert len(rows) == 3 * 600
    assert max(len(side) for i in range(len(rows)) for side in rows.pair(i)) == row


def test_mixture_with_weights_tags_and_a_corpus_without_validation(tmp_path, corpus):
    back = write_corpus(tmp_path / "back", "train", range(7000, 7100))
    fields = config(corpus).data
    mixed = (*fields.corpus, f"text:{tmp_path}/back/{{split}}.{{lang}};weight=0.5;tag=<bt>")
    store = prepare(Config(data=dataclasses.replace(fields, corpus=mixed)), tmp_path / "store")
    plain, tagged = store.tables("train")
    assert (plain.weight, tagged.weight, len(plain), len(tagged)) == (1.0, 0.5, 600, 100)
    assert len(store.tables("validation")) == 1
    tag = store.tokenizer.tag_id("<bt>")
    rows = [tagged.pair(i)[0].tolist() for i in range(100)]
    assert [row[0] for row in rows] == [tag] * 100
    assert store.tokenizer.decode([row[1:-1] for row in rows]) == [source for source, _ in back]
    assert store.tokenizer.encode(["<bt> red house"])[0] == [tag, *store.tokenizer.encode(["red house"])[0]]
    assert not any(tag in plain.pair(i)[0] for i in range(600))
    assert source_lengths(tagged).tolist() == [len(row) for row in rows]


def test_what_a_mixture_lacks_is_found_before_anything_is_read(tmp_path, corpus, monkeypatch):
    """Not after the hours that the corpora before it take."""
    monkeypatch.setattr(store_builder, "_scan", None)
    fields = config(corpus).data
    mixed = dataclasses.replace(fields, corpus=(*fields.corpus, f"text:{tmp_path}/none/{{split}}.{{lang}}"))
    with pytest.raises(InputError, match=r"none/train\.en: no such file"):
        prepare(Config(data=mixed), tmp_path / "store")
    monkeypatch.undo()
    prepare(config(corpus), tmp_path / "store")
    monkeypatch.setattr(store_builder, "_scan", None)
    with pytest.raises(InputError, match="tag '<2de>' is not in the tokenizer"):
        prepare(config(corpus, options=";tag=<2de>"), tmp_path / "other", tmp_path / "store" / "tokenizer.model")


def test_a_corpus_for_training_alone_is_named_by_its_files(tmp_path, corpus):
    back = write_corpus(tmp_path / "back", "train", range(7000, 7100))
    fields = config(corpus).data
    mixed = dataclasses.replace(fields, corpus=(*fields.corpus, f"text:{tmp_path}/back/train.{{lang}}"))
    report = prepare(Config(data=mixed), tmp_path / "store").report
    origin = f"{tmp_path}/back/train.en and {tmp_path}/back/train.de"
    assert [(split.origin, split.pairs) for split in report.splits if split.pairs == len(back)] == [(origin, len(back))]
    alone = dataclasses.replace(fields, corpus=mixed.corpus[1:])
    with pytest.raises(InputError, match=r"back/train.\{lang\} has no \{split\} in it, and is for training alone"):
        prepare(Config(data=alone), tmp_path / "other")


def test_validation_text_has_the_tag_that_its_tokens_have(tmp_path, corpus):
    tagged = config(corpus, options=";tag=<2de>")
    store = prepare(tagged, tmp_path / "store")
    [table] = store.tables("validation")
    for index, (source, target) in enumerate(store.text("validation")):
        assert source.startswith("<2de> ") and not target.startswith("<2de>")
        assert store.tokenizer.encode([source])[0] == table.pair(index)[0][:-1].tolist()


def test_a_corpus_that_changes_while_it_is_read_is_named(tmp_path, corpus, monkeypatch):
    train = store_builder.train_tokenizer

    def meanwhile(*arguments):
        for language in ("en", "de"):
            with (corpus / f"train.{language}").open("a") as file:
                file.write("more\n")
        return train(*arguments)

    monkeypatch.setattr(store_builder, "train_tokenizer", meanwhile)
    for drop_duplicates in (True, False):
        with pytest.raises(InputError, match=r"has changed while it was read, from 60[01] pairs at first"):
            prepare(config(corpus, drop_duplicates=drop_duplicates), tmp_path / "store")
        assert not (tmp_path / "store").exists()


def test_a_corpus_that_changes_to_as_many_lines_is_named_too(tmp_path, corpus, monkeypatch):
    train = store_builder.train_tokenizer

    def meanwhile(*arguments):
        path = corpus / "train.de"
        path.write_bytes(path.read_bytes().swapcase())
        os.utime(path, ns=(0, 0))
        return train(*arguments)

    monkeypatch.setattr(store_builder, "train_tokenizer", meanwhile)
    with pytest.raises(InputError, match=r"train\.de: has changed while it was read: prepare it once"):
        prepare(config(corpus), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((b"", b""), r"train\.en and .*train\.de: no pairs in the split 'train'"),
        ((b"\n \n", b"\n\n"), r"each of the 2 pairs has an empty side"),
        ((b"a b\n" * 3, b"c\n" * 2), r"3 lines .* has 2"),
        ((b"word " * 500, b"Wort"), r"every one of 1 pairs was dropped \(longer than a row: 1 pairs"),
    ],
)
def test_unusable_corpus_is_refused_and_leaves_nothing(tmp_path, corpus, lines, message):
    for language, content in zip(("en", "de"), lines, strict=True):
        (corpus / f"train.{language}").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare(config(corpus), tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


def test_what_is_dropped_and_named_in_a_later_chunk(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(store_builder, "_CHUNK", 70)
    for language in ("en", "de"):
        path = corpus / f"train.{language}"
        lines = path.read_text().split("\n")[:-1]
        path.write_text("\n".join([*lines[:200], *lines[150:200], *lines[200:], "red " * 400]) + "\n")
    store = prepare(config(corpus, drop_duplicates=True), tmp_path / "store")
    assert texts(store, "train") == write_corpus(tmp_path / "again", "train", range(1000, 1600))
    assert store.report.splits[0].findings[checks.LONG].first_lines == [651]


def test_half_a_validation_split_is_named(tmp_path, corpus):
    write_corpus(tmp_path / "other", "train", range(2000, 2010))
    (tmp_path / "other" / "validation.en").write_text("red\n")
    with pytest.raises(InputError, match=r"other/validation\.de: no such file"):
        prepare(config(corpus, tmp_path / "other"), tmp_path / "store")


def test_two_corpora_may_have_one_tag(tmp_path, corpus):
    write_corpus(tmp_path / "other", "train", range(2000, 2010))
    store = prepare(config(corpus, tmp_path / "other", options=";tag=<bt>"), tmp_path / "store")
    assert store.tokenizer.tag_id("<bt>")


def test_the_tokenizer_is_not_trained_on_validation_text(tmp_path, corpus):
    for language in ("en", "de"):
        (corpus / f"validation.{language}").write_text("qqq qqq\n" * 40)
    tokenizer = prepare(config(corpus), tmp_path / "store").tokenizer
    assert not any("q" in piece for piece in tokenizer.pieces(range(tokenizer.vocab_size)))


def test_a_corpus_of_utf_16_is_refused(tmp_path, corpus):
    for language in ("en", "de"):
        path = corpus / f"train.{language}"
        path.write_bytes(path.read_text().encode("utf-16-le"))
    with pytest.raises(InputError, match="of UTF-16, `iconv"):
        prepare(config(corpus), tmp_path / "store")
