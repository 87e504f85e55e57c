"""Specs, text files as they come, and the checks of what is read."""

import gzip
import os

import numpy as np
import pytest
from etils import epath

from tfm.config import DataConfig, InputError
from tfm.data import checks
from tfm.data.checks import SplitReport, TextChecks, check_lengths
from tfm.data.corpus import Corpus, corpora_with, open_corpora, parse_spec, read_lines, single_line, to_text


def text_corpus(pattern, **fields) -> Corpus:
    return open_corpora(DataConfig(corpus=(f"text:{pattern}",), **fields))[0]


def write_pair(directory, source: bytes, target: bytes, split: str = "train") -> Corpus:
    (directory / f"{split}.en").write_bytes(source)
    (directory / f"{split}.de").write_bytes(target)
    return text_corpus(f"{directory}/{{split}}.{{lang}}")


def test_spec_is_taken_apart():
    spec = parse_spec("text:a/{split}.{lang}.gz;weight=2.5;tag=<bt>")
    assert (spec.kind, spec.location, spec.weight, spec.tag) == ("text", "a/{split}.{lang}.gz", 2.5, "<bt>")
    assert (parse_spec("demo").weight, parse_spec("demo").tag) == (1.0, None)
    assert parse_spec("tfds:wmt14_translate/de-en:1.0.0").location == "wmt14_translate/de-en:1.0.0"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("csv:a", "tfds:NAME/CONFIG"),
        ("text:", "text:PATTERN"),
        ("demo:small", "demo"),
        ("demo;weight=0", "weight '0'"),
        ("demo;weight=nan", "weight 'nan'"),
        ("demo;weight=two", "weight 'two'"),
        ("demo;weight=1e7", "at most 1000"),
        ("demo;tag=2de", "<2de>"),
        ("demo;tag=<2 de>", "<2 de>"),
        ("demo;tag=<s>", "'<s>' is a piece of every tokenizer"),
        ("demo;tag=<0x41>", "'<0x41>' is a piece of every tokenizer"),
        ("demo;wieght=2", "'wieght=2'"),
    ],
)
def test_wrong_spec_is_refused(spec, named):
    with pytest.raises(InputError, match=r"data\.corpus") as error:
        parse_spec(spec)
    assert named in str(error.value)


def test_lines_end_at_newline_alone(tmp_path):
    source = "a\u2028b\u0085c\rd\x0be\x1cf\nsecond\r\nlast"  # no final newline
    corpus = write_pair(tmp_path, source.encode(), b"1\n2\n3")
    pairs = list(corpus.pairs("train"))
    assert [to_text(source) for source, _ in pairs] == ["a b c d e f", "second", "last"]
    assert [target for _, target in pairs] == [b"1", b"2", b"3"]


def test_gzip_is_known_by_its_bytes_and_not_by_its_name(tmp_path):
    zipped = gzip.compress(b"one\ntwo\n") + gzip.compress(b"three\n")  # two members, as `cat a.gz b.gz` makes
    assert [s for s, _ in write_pair(tmp_path, zipped, b"1\n2\n3\n").pairs("train")] == [b"one", b"two", b"three"]
    (tmp_path / "train.en.gz").write_bytes(b"plain\n")
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"1\n"))
    assert list(text_corpus(f"{tmp_path}/{{split}}.{{lang}}.gz").pairs("train")) == [(b"plain", b"1")]


def test_what_is_no_text_becomes_a_replacement():
    assert single_line(b"Schl\xe4ft\ter".decode("utf-8", errors="surrogateescape")) == "Schl\ufffdft er"


def test_byte_order_mark_goes_at_the_start_of_a_file_only(tmp_path):
    bom = b"\xef\xbb\xbf"
    corpus = write_pair(tmp_path, bom + b"one\n" + bom + b"two\n", gzip.compress(bom + b"1\n2\n"))
    assert list(corpus.pairs("train")) == [(b"one", b"1"), (bom + b"two", b"2")]


def test_languages_choose_the_sides(tmp_path):
    write_pair(tmp_path, b"one\n", b"eins\n")
    turned = text_corpus(f"{tmp_path}/{{split}}.{{lang}}", source_language="de", target_language="en")
    assert list(turned.pairs("train")) == [(b"eins", b"one")]


def test_tab_separated(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"one\teins\ntwo\tzwei\t0.93\n\t\n\nthree\t\n")
    corpus = text_corpus(f"{tmp_path}/{{split}}.tsv")
    expected = [(b"one", b"eins"), (b"two", b"zwei"), (b"", b""), (b"", b""), (b"three", b"")]
    assert list(corpus.pairs("train")) == expected


def test_tab_separated_line_without_tab_is_refused(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"one\teins\ntwo zwei\n")
    with pytest.raises(InputError, match=r"train.tsv, line 2: no tab"):
        list(text_corpus(f"{tmp_path}/{{split}}.tsv").pairs("train"))


@pytest.mark.parametrize(("source", "target", "counts"), [(5, 3, "5 lines .* has 3"), (3, 5, "3 lines .* has 5")])
def test_unequal_line_counts_name_both_files_and_counts(tmp_path, source, target, counts):
    corpus = write_pair(tmp_path, b"s\n" * source, b"t\n" * target)
    with pytest.raises(InputError, match=counts) as error:
        list(corpus.pairs("train"))
    assert str(tmp_path / "train.en") in str(error.value) and str(tmp_path / "train.de") in str(error.value)


def test_missing_file_is_named(tmp_path):
    (tmp_path / "train.en").write_bytes(b"one\n")
    with pytest.raises(InputError, match=r"train\.de: no such file"):
        list(text_corpus(f"{tmp_path}/{{split}}.{{lang}}").pairs("train"))


@pytest.mark.parametrize("content", [b"one\ntwo\n", gzip.compress(b"one\ntwo\n"), b""], ids=["plain", "gzip", "empty"])
def test_a_pipe_is_read_as_a_file_is(content):
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    lines = list(read_lines(epath.Path(f"/dev/fd/{reading}")))
    os.close(reading)
    assert lines == ([b"one", b"two"] if content else [])


@pytest.mark.parametrize("cut", [15, 25])
def test_damaged_gzip_is_named(tmp_path, cut):
    whole = gzip.compress(b"a sentence that is long enough to be cut\n" * 3)
    with pytest.raises(InputError, match=r"train\.en: cannot be read"):
        list(write_pair(tmp_path, whole[:cut], b"1\n2\n3\n").pairs("train"))


def test_corpora_without_the_split_are_left_out(tmp_path):
    write_pair(tmp_path, b"one\n", b"eins\n", "dev")
    pattern = f"text:{tmp_path}/{{split}}.{{lang}}"
    (tmp_path / "fixed.tsv").write_bytes(b"one\teins\n")
    corpora = open_corpora(DataConfig(corpus=(pattern, f"text:{tmp_path}/fixed.tsv")))
    assert corpora_with(corpora, "dev", "data.validation_split") == corpora[:1]
    with pytest.raises(InputError, match=r"no corpus has the split 'other' .*set data.test_split to") as refusal:
        corpora_with(corpora, "other", "data.test_split")
    assert str(tmp_path / "other.en") in str(refusal.value)
    assert "fixed.tsv has no {split} in it" in str(refusal.value)


def findings(pairs: list[tuple[bytes, bytes]], chunk: int, **fields) -> SplitReport:
    report = SplitReport("c", "train", "files", **{"training": True, "drop_duplicates": False, **fields})
    text_checks = TextChecks(report)
    for start in range(0, len(pairs), chunk):
        part = pairs[start : start + chunk]
        text_checks.add(part, [(to_text(source), to_text(target)) for source, target in part])
    report.repeated = text_checks.finish()
    return report


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_checks_count_and_give_the_first_lines(chunk):
    pairs = [
        (b"good", b"gut"),  # 1
        (b"", b"leer"),  # 2: empty
        (b" \r", b"leer"),  # 3: empty
        (b"bad \xff byte", b"x"),  # 4: not UTF-8
        (b"nul", b"a\0b"),  # 5: NUL
        (b"good", b"gut"),  # 6: repeats 1
        (b"cut \xc3", b"\xa4 here"),  # 7: not UTF-8, although both sides end to end would be
        (b"\0", b"nur NUL"),  # 8: NUL, empty
        (b"good", b"gut"),  # 9: repeats 1
        (b"goo", b"dgut"),  # 10
    ]
    report = findings(pairs, chunk)
    lines = {kind: finding.first_lines for kind, finding in report.findings.items() if finding.count}
    expected = {checks.EMPTY: [2, 3, 8], checks.UTF8: [4, 7], checks.NUL: [5, 8], checks.DUPLICATE: [6, 9]}
    assert lines == expected
    assert np.flatnonzero(report.repeated).tolist() == [5, 8]


def test_only_the_first_lines_are_listed_but_all_are_counted():
    report = findings([(b"", b"x")] * 12, chunk=5)
    assert report.findings[checks.EMPTY].first_lines == [1, 2, 3, 4, 5]
    assert report.findings[checks.EMPTY].count == 12 and report.findings[checks.DUPLICATE].count == 11
    assert "empty side: 12 pairs (line 1, 2, 3, 4, 5, …): dropped" in "\n".join(report.lines())


def test_training_drops_and_other_splits_never_do():
    empty = np.array([False, True, False, False, False])
    source = np.array([10, 1, 65, 200, 2])
    target = np.array([10, 4, 60, 3, 9])
    kept = {}
    for training in (True, False):
        report = SplitReport("c", "s", "files", training=training, drop_duplicates=True)
        keep = check_lengths(report, 101, empty, source, target, row_lengths=(64, 256), max_ratio=9.0)
        kept[training] = keep.tolist()
        assert report.findings[checks.LONG].first_lines == [103, 104]
        assert report.findings[checks.RATIO].count == 0, "a pair is counted as too long, and not again for its ratio"
    assert kept == {True: [True, False, False, False, True], False: [True] * 5}


def test_length_ratio_is_taken_with_five_added():
    report = SplitReport("c", "s", "files", training=True, drop_duplicates=False)
    source, target = np.array([49, 50, 1, 1]), np.array([1, 1, 49, 50])
    keep = check_lengths(report, 1, np.zeros(4, bool), source, target, (256, 256), max_ratio=9.0)
    assert keep.tolist() == [True, False, True, False]  # (49 + 5) / (1 + 5) = 9


def test_files_may_be_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pair(tmp_path, b"a\n", b"b\n")
    [corpus] = open_corpora(DataConfig(corpus=("text:~/{split}.{lang}",)))
    assert corpus.has_split("train")
