"""`prepare` on text files, and the store that it leaves: what is in it, what it refuses, what an accident leaves."""

import contextlib
import dataclasses
import fcntl
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tfm.config import Config, DataConfig, InputError
from tfm.data import checks, shards, store_builder
from tfm.data.checks import CorpusReport
from tfm.data.shards import PairTable, Shard
from tfm.data.store import TokenStore, _cache_of, open_store, prepare, store_directory
from tfm.data.tokenizer import EOS

WORDS = ["red", "house", "tree", "dog", "blue", "walks", "sees", "green", "tall", "cat"]
WORTE = ["rotes", "Haus", "Baum", "Hund", "blau", "geht", "sieht", "grün", "hoch", "Katze"]


def write_corpus(directory: Path, split: str, numbers: range) -> list[tuple[str, str]]:
    """Sentences whose words are the digits of a number, and their German."""
    pairs = [(" ".join(WORDS[int(d)] for d in str(n)), " ".join(WORTE[int(d)] for d in str(n))) for n in numbers]
    directory.mkdir(exist_ok=True)
    for side, language in enumerate(("en", "de")):
        (directory / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))
    return pairs


def source_lengths(table: PairTable) -> np.ndarray:
    return table.lengths("source", np.arange(len(table)))


def config(*directories: Path, options: str = "", **fields) -> Config:
    corpus = tuple(f"text:{directory}/{{split}}.{{lang}}{options}" for directory in directories)
    return Config(data=DataConfig(**{"corpus": corpus, "vocab_size": 330, **fields}))


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_corpus(tmp_path / "corpus", "train", range(1000, 1600))
    write_corpus(tmp_path / "corpus", "validation", range(1600, 1640))
    return tmp_path / "corpus"


def texts(store: TokenStore, split: str, table: int = 0) -> list[tuple[str, str]]:
    rows = store.tables(split)[table]
    pairs = [rows.pair(i) for i in range(len(rows))]
    assert all(ids[-1] == EOS for pair in pairs for ids in pair)
    return [tuple(store.tokenizer.decode([ids[:-1] for ids in pair])) for pair in pairs]


def test_every_pair_comes_back_in_order(tmp_path, corpus):
    store = prepare(config(corpus), tmp_path / "run" / "store")
    expected = {split: write_corpus(tmp_path / "again", split, numbers)
                for split, numbers in (("train", range(1000, 1600)), ("validation", range(1600, 1640)))}  # fmt: skip
    assert {split: texts(store, split) for split in expected} == expected
    assert store.text("validation") == expected["validation"]
    store.verify()
    table = store.tables("train")[0]
    assert source_lengths(table).tolist() == [len(table.pair(i)[0]) for i in range(600)]
    assert table.lengths("target", np.array([5, 599, 0])).tolist() == [len(table.pair(i)[1]) for i in (5, 599, 0)]
    with pytest.raises(IndexError, match="pair 600 of 600"):
        table.pair(600)
    with pytest.raises(InputError, match="no split 'test', only train, validation"):
        store.tables("test")


def test_same_input_gives_the_same_store_and_a_change_another(tmp_path, corpus):
    stores = [prepare(config(corpus), tmp_path / name) for name in ("a", "b")]
    assert stores[0].corpus_hash == stores[1].corpus_hash
    assert stores[0].manifest["files"] == stores[1].manifest["files"]
    weighted = prepare(config(corpus, options=";weight=2"), tmp_path / "c")
    assert weighted.tables("train")[0].weight == 2.0
    assert weighted.corpus_hash != stores[0].corpus_hash


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


def test_validation_text_has_the_tag_that_its_tokens_have(tmp_path, corpus):
    tagged = config(corpus, options=";tag=<2de>")
    store = prepare(tagged, tmp_path / "store")
    [table] = store.tables("validation")
    for index, (source, target) in enumerate(store.text("validation")):
        assert source.startswith("<2de> ") and not target.startswith("<2de>")
        assert store.tokenizer.encode([source])[0] == table.pair(index)[0][:-1].tolist()


def test_text_of_several_corpora_is_taken_in_turn(tmp_path, corpus):
    more = write_corpus(tmp_path / "other", "validation", range(1640, 1643))
    write_corpus(tmp_path / "other", "train", range(2000, 2010))
    store = prepare(config(corpus, tmp_path / "other"), tmp_path / "store")
    first = [pair for pair in store.text("validation") if pair not in more]
    assert store.text("validation", 4) == [first[0], more[0], first[1], more[1]]
    assert store.text("validation") == [pair for both in zip(first, more, strict=False) for pair in both] + first[3:]
    assert len(first) == 40


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


def test_many_shards_and_chunks_read_as_one(tmp_path, corpus, monkeypatch):
    one = prepare(config(corpus), tmp_path / "one").tables("train")[0]
    monkeypatch.setattr(store_builder, "_CHUNK", 70)
    monkeypatch.setattr(shards, "SHARD_PAIRS", 150)
    monkeypatch.setattr(shards, "_RESIDENT_BYTES", 0)  # pages are let go of as in a large table, but sooner
    monkeypatch.setattr(shards, "_READS", 7)
    store = prepare(config(corpus), tmp_path / "many")
    many = store.tables("train")[0]
    assert len(store.manifest["tables"][0]["shards"]) == 3
    indices = np.random.default_rng(0).permutation(600)
    for side in ("source", "target"):
        assert np.array_equal(many.lengths(side, indices), one.lengths(side, indices))
    assert np.array_equal(source_lengths(many), source_lengths(one))
    assert all(np.array_equal(x, y) for i in indices for x, y in zip(many.pair(i), one.pair(i), strict=True))
    store.verify()


def test_chunk_of_which_nothing_stays_makes_no_shard(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(store_builder, "_CHUNK", 150)
    monkeypatch.setattr(shards, "SHARD_PAIRS", 150)
    for language in ("en", "de"):
        with (corpus / f"train.{language}").open("a") as file:
            file.write("\n" * 200)
    store = prepare(config(corpus), tmp_path / "store")
    assert [shard["pairs"] for shard in store.manifest["tables"][0]["shards"]] == [150] * 4
    assert store.report.splits[0].findings[checks.EMPTY].count == 200


def test_a_table_of_a_shard_in_memory():
    tokens = {"source": np.array([5, 1, 6, 7, 1]), "target": np.array([8, 1, 1])}
    shard = Shard.from_tokens(tokens, {"source": np.array([2, 3]), "target": np.array([2, 1])})
    table = PairTable("memory", 1.0, [shard])
    assert [[side.tolist() for side in table.pair(i)] for i in range(2)] == [[[5, 1], [8, 1]], [[6, 7, 1], [1]]]
    assert table.lengths("source", np.array([1, 0, 1])).tolist() == [3, 2, 3]


def test_given_tokenizer_is_used(tmp_path, corpus):
    first = prepare(config(corpus), tmp_path / "first")
    write_corpus(tmp_path / "other", "train", range(20, 90))
    write_corpus(tmp_path / "other", "validation", range(10, 20))
    given = config(tmp_path / "other", tokenizer=str(first.tokenizer_path), vocab_size=9999)
    second = prepare(given, tmp_path / "second")
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    without = dataclasses.replace(given.data, tokenizer=None, vocab_size=7)
    assert prepare(Config(data=without), tmp_path / "second", first.tokenizer_path).corpus_hash == second.corpus_hash
    with pytest.raises(InputError, match=r"tag '<x>' is not in the tokenizer"):
        prepare(config(corpus, options=";tag=<x>", tokenizer=str(first.tokenizer_path)), tmp_path / "third")
    assert not list(tmp_path.glob("third*"))


def test_store_is_used_again_and_refused_for_other_fields(tmp_path, corpus):
    directory = tmp_path / "store"
    prepare(config(corpus), directory)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    prepare(config(corpus, window_pairs=7), directory)
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    with pytest.raises(InputError) as error:
        prepare(config(corpus, vocab_size=300, target_row_length=99), directory)
    assert "data.target_row_length=256 there and 99 here; data.vocab_size=330 there and 300 here" in str(error.value)
    assert "source_row_length" not in str(error.value)
    with pytest.raises(InputError, match=r"data\.tokenizer=None there"):
        prepare(config(corpus, tokenizer=str(directory / "tokenizer.model")), directory)
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_changed_text_is_noticed_but_a_touched_or_absent_file_is_not(tmp_path, corpus):
    prepare(config(corpus), tmp_path / "store")
    source = corpus / "train.en"
    os.utime(source)
    prepare(config(corpus), tmp_path / "store")
    text = source.read_text()
    source.write_text(text.replace("red", "rad", 1))
    with pytest.raises(InputError, match=r"corpus/train\.en has changed since"):
        prepare(config(corpus), tmp_path / "store")
    source.write_text(text)
    shutil.rmtree(corpus)
    assert len(prepare(config(corpus), tmp_path / "store").tables("train")[0]) == 600


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"shard: missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"shard: \d+ bytes long, not \d+"),
    ],
)
def test_missing_or_cut_file_is_named_on_opening(tmp_path, corpus, damage, message):
    prepare(config(corpus), tmp_path / "store")
    damage(tmp_path / "store" / "0-train-00000.shard")
    with pytest.raises(InputError, match=message):
        open_store(tmp_path / "store")


def test_flipped_bit_is_named_by_verify(tmp_path, corpus):
    store = prepare(config(corpus), tmp_path / "store")
    path = tmp_path / "store" / "1-validation-00000.shard"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"1-validation-00000\.shard: its content"):
        store.verify()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 99}'])
def test_other_manifest_is_refused(tmp_path, corpus, content):
    prepare(config(corpus), tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        open_store(tmp_path / "store")
    with pytest.raises(InputError, match=r"manifest\.json"):
        prepare(config(corpus), tmp_path / "store")


def test_no_store_there(tmp_path):
    with pytest.raises(InputError, match=r"none/manifest\.json: no token store"):
        open_store(tmp_path / "none")


@contextlib.contextmanager
def file_size_limit(size: int):
    """Files can't grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 15_000])
def test_full_disk_leaves_nothing(tmp_path, corpus, size):
    whole = prepare(config(corpus), tmp_path / "whole").directory
    assert max(path.stat().st_size for path in whole.iterdir()) > 15_000
    with file_size_limit(size), pytest.raises(InputError, match=r"store\.partial: the token store cannot be written"):
        prepare(config(corpus), tmp_path / "store")
    assert not list(tmp_path.glob("store*"))
    prepare(config(corpus), tmp_path / "store")


def test_directory_that_cannot_be_made_is_named(tmp_path, corpus):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/store\.partial: the token store cannot be written"):
        prepare(config(corpus), tmp_path / "file" / "store")


def test_other_content_is_not_overwritten(tmp_path, corpus):
    (tmp_path / "store").mkdir()
    prepare(config(corpus), tmp_path / "store")  # an empty directory is no obstacle
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"mine: is in the way"):
        prepare(config(corpus), tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_what_a_killed_call_left_is_replaced_and_a_living_one_respected(tmp_path, corpus):
    partial = tmp_path / "store.partial"
    partial.mkdir()
    (partial / "0-train-00007.shard").write_bytes(b"half")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is preparing"):
        prepare(config(corpus), tmp_path / "store")
    os.close(descriptor)
    prepare(config(corpus), tmp_path / "store").verify()
    assert not partial.exists() and not (tmp_path / "store" / "0-train-00007.shard").exists()


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


def test_invalid_bytes_and_nul_are_mended_and_counted(tmp_path, corpus):
    with (corpus / "train.en").open("ab") as file:
        file.write(b"red \xff house\nblue\0 cat\n")
    with (corpus / "train.de").open("ab") as file:
        file.write(b"rotes Haus\nblau Katze\n")
    store = prepare(config(corpus), tmp_path / "store")
    assert texts(store, "train")[600:] == [("red \ufffd house", "rotes Haus"), ("blue cat", "blau Katze")]
    findings = store.report.splits[0].findings
    assert (findings[checks.UTF8].first_lines, findings[checks.NUL].first_lines) == ([601], [602])


def test_cache_is_filled_once_and_read_from(tmp_path, corpus):
    cached = config(corpus, cache_dir=str(tmp_path / "cache"))
    store = prepare(cached, tmp_path / "store")
    assert store.directory.parent == tmp_path / "cache"
    store.verify()
    expected = texts(store, "train")
    for path in (tmp_path / "store").glob("*.shard"):
        path.unlink()
    again = open_store(tmp_path / "store", tmp_path / "cache")
    assert texts(again, "train") == expected and again.corpus_hash == store.corpus_hash
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_remote_store_needs_a_cache_and_says_so_before_anything_is_prepared(corpus):
    with pytest.raises(InputError, match=r"^gs://bucket/store: is not on a local disk; set data.cache_dir"):
        _cache_of(epath.Path("gs://bucket/store"), None)


def test_what_killed_copies_left_in_a_cache_goes_and_a_living_one_stays(tmp_path, corpus):
    prepare(config(corpus), tmp_path / "store")
    cache = tmp_path / "cache"
    for name in ("killed", "living"):
        (cache / f"tfm-scratch-{name}").mkdir(parents=True)
        (cache / f"tfm-scratch-{name}" / "part").write_bytes(b"part")
    living = os.open(cache / "tfm-scratch-living", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    open_store(tmp_path / "store", cache)
    os.close(living)
    names = sorted(path.name for path in cache.iterdir())
    assert [name.rpartition("-")[0] for name in names] == ["store", "tfm-scratch"] and names[1].endswith("living")


def test_more_shards_than_files_may_be_open(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_TOKENS", 100)
    monkeypatch.setattr(store_builder, "_CHUNK", 25)
    store = prepare(config(corpus), tmp_path / "store")
    assert len(store.manifest["tables"][0]["shards"]) > 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 10, hard))
        assert texts(open_store(tmp_path / "store"), "train") == texts(store, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_damaged_store_is_not_cached(tmp_path, corpus):
    prepare(config(corpus), tmp_path / "store")
    path = tmp_path / "store" / "0-train-00000.shard"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"0-train-00000\.shard: its content"):
        open_store(tmp_path / "store", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_place_of_the_store(tmp_path):
    assert store_directory(Config(), "runs/a") == "runs/a/store"
    assert store_directory(Config(data=DataConfig(store="gs://bucket/store")), "runs/a") == "gs://bucket/store"


def test_a_store_from_before_validation_text_had_tags_is_refused(tmp_path, corpus):
    tagged = config(corpus, options=";tag=<2de>")
    prepare(tagged, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["fields"]["text"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"text=None there and 'tagged' here"):
        prepare(tagged, tmp_path / "store")
