"""What `prepare` finds wrong with a corpus: what is counted, and which pairs are dropped, mended or kept."""

import json

from tests.data.stores import config, source_lengths, texts, write_corpus
from tfm.data import checks
from tfm.data.checks import CorpusReport
from tfm.data.store import prepare


def test_training_drops_and_counts_and_validation_keeps(tmp_path):
    lines = [("red house", "rotes Haus"), ("", "Hund"), ("tree " * 40, "Baum " * 40), ("dog", "Hund " * 20),
             ("red house", "rotes Haus"), ("blue cat", "blau Katze")]  # fmt: skip
    (tmp_path / "c").mkdir()
    for split in ("train", "validation"):
        for side, language in enumerate(("en", "de")):
            (tmp_path / "c" / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in lines))
    fields = {"vocab_size": 2000, "source_row_length": 30, "target_row_length": 30, "max_length_ratio": 2.0}
    store = prepare(config(tmp_path / "c", drop_duplicates=True, **fields), tmp_path / "store")
    assert texts(store, "train") == [lines[0], lines[5]]
    assert texts(store, "validation") == store.text("validation") == [(s.strip(), t.strip()) for s, t in lines]
    train, validation = store.report.splits
    for kind, line in ((checks.EMPTY, 2), (checks.LONG, 3), (checks.RATIO, 4), (checks.DUPLICATE, 5)):
        for report, action in ((train, "dropped"), (validation, "kept")):
            finding = report.findings[kind]
            assert (finding.count, finding.first_lines, finding.action) == (1, [line], action), kind
    assert (train.pairs, train.stored, validation.stored) == (6, 2, 6)
    assert train.source_tokens == source_lengths(store.tables("train")[0]).sum()
    assert "6 pairs, 4 dropped, 2 stored" in str(store.report)
    assert "lowered from 2000" in str(store.report)
    assert CorpusReport.from_dict(json.loads(json.dumps(store.report.to_dict()))) == store.report
    kept = prepare(config(tmp_path / "c", **fields), tmp_path / "kept")
    assert texts(kept, "train") == [lines[0], lines[4], lines[5]]


def test_row_length_counts_the_end_and_the_tag(tmp_path, corpus):
    write_corpus(corpus, "train", range(700, 1300))  # of three words, and of four
    longest = max(source_lengths(prepare(config(corpus), tmp_path / "a").tables("train")[0]))
    whole = {"source_row_length": int(longest)}
    assert prepare(config(corpus, **whole), tmp_path / "b").report.splits[0].stored == 600
    tagged = prepare(config(corpus, options=";tag=<x>", **whole), tmp_path / "c").report.splits[0]
    assert tagged.stored < 600 and tagged.findings[checks.LONG].count == 600 - tagged.stored


def test_invalid_bytes_and_nul_are_mended_and_counted(tmp_path, corpus):
    with (corpus / "train.en").open("ab") as file:
        file.write(b"red \xff house\nblue\0 cat\n")
    with (corpus / "train.de").open("ab") as file:
        file.write(b"rotes Haus\nblau Katze\n")
    store = prepare(config(corpus), tmp_path / "store")
    assert texts(store, "train")[600:] == [("red \ufffd house", "rotes Haus"), ("blue cat", "blau Katze")]
    findings = store.report.splits[0].findings
    assert (findings[checks.UTF8].first_lines, findings[checks.NUL].first_lines) == ([601], [602])
