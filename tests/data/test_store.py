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

from tests.data.stores import config, source_lengths, texts, write_corpus
from tfm.config import Config, DataConfig, InputError
from tfm.data import shards, store_builder
from tfm.data import store as store_module
from tfm.data.scratch import MARKER
from tfm.data.store import _cache_of, open_store, prepare, store_directory


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


def test_text_of_several_corpora_is_taken_in_turn(tmp_path, corpus):
    more = write_corpus(tmp_path / "other", "validation", range(1640, 1643))
    write_corpus(tmp_path / "other", "train", range(2000, 2010))
    store = prepare(config(corpus, tmp_path / "other"), tmp_path / "store")
    first = [pair for pair in store.text("validation") if pair not in more]
    assert store.text("validation", 4) == [first[0], more[0], first[1], more[1]]
    assert store.text("validation") == [pair for both in zip(first, more, strict=False) for pair in both] + first[3:]
    assert len(first) == 40


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
    others = dict(drop_duplicates=True, max_length_ratio=3.0, segmentations=2, segmentation_alpha=0.5)
    others |= dict(tokenizer_model="bpe", tokenizer_sample=10, train_split="validation", validation_split="train")
    others |= dict(source_language="de", target_language="en", corpus=("demo",), source_row_length=99)
    for name, value in others.items():
        with pytest.raises(InputError, match=rf"data\.{name}="):
            prepare(config(corpus, **{name: value}), directory)
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
    (partial / MARKER).touch()
    (partial / "0-train-00007.shard").write_bytes(b"half")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is preparing"):
        prepare(config(corpus), tmp_path / "store")
    os.close(descriptor)
    prepare(config(corpus), tmp_path / "store").verify()
    assert not partial.exists()
    assert not {"0-train-00007.shard", MARKER} & {path.name for path in (tmp_path / "store").iterdir()}


def test_what_lies_where_the_store_would_be_built_and_is_no_store_s_stays(tmp_path, corpus):
    partial = tmp_path / "store.partial"
    (partial / "download").mkdir(parents=True)
    (partial / "mine.gz").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"store.partial: .* it holds download, which is none of its files"):
        prepare(config(corpus), tmp_path / "store")
    assert (partial / "mine.gz").read_bytes() == b"mine" and (partial / "download").is_dir()


def test_a_link_to_a_directory_of_another_disk_is_followed(tmp_path, corpus):
    (tmp_path / "big").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "big")
    prepare(config(corpus), tmp_path / "store").verify()
    assert (tmp_path / "store").is_symlink() and (tmp_path / "big" / "manifest.json").is_file()


def test_a_whole_disk_is_refused_before_anything_is_prepared(tmp_path, corpus, monkeypatch):
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "store")
    with pytest.raises(InputError, match="store: is a whole disk of its own; name a directory on it"):
        prepare(config(corpus), tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()


@pytest.mark.parametrize("address", ["https://localhost:1/x", "file:///tmp/x"])
def test_an_address_of_another_kind_is_refused(corpus, address):
    with pytest.raises(InputError, match="no kind of address that can be read"):
        prepare(config(corpus), address)
    with pytest.raises(InputError, match="no kind of address that can be read"):
        prepare(config(address), "/never")


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


def test_other_tokens_or_another_tokenizer_have_another_hash(tmp_path, corpus):
    """By which a run notices that its data is no longer that of its checkpoints."""
    first = prepare(config(corpus), tmp_path / "a")
    assert prepare(config(corpus, vocab_size=300), tmp_path / "b").corpus_hash != first.corpus_hash
    path = corpus / "train.de"
    path.write_text("".join(f"{line}\n" for line in sorted(path.read_text().split("\n")[:-1])))
    given = config(corpus, tokenizer=str(first.tokenizer_path))
    assert prepare(given, tmp_path / "c").corpus_hash != first.corpus_hash


def test_a_remote_store_gets_its_manifest_last(tmp_path, corpus, monkeypatch):
    """What an interrupted upload leaves is then no store."""
    monkeypatch.setattr(store_module, "_is_remote", lambda path: path.name == "remote")
    (tmp_path / "remote").mkdir()
    kind, copied = type(epath.Path(tmp_path)), []
    copy = kind.copy
    monkeypatch.setattr(kind, "copy", lambda self, to, **more: copied.append(str(to)) or copy(self, to, **more))
    prepare(config(corpus, cache_dir=str(tmp_path / "cache")), tmp_path / "remote")
    uploaded = [to for to in copied if "/remote/" in to]
    assert len(uploaded) > 1 and uploaded[-1].endswith("/remote/manifest.json")


@pytest.mark.parametrize(
    ("has_begun", "advice"), [(True, "put back what has changed"), (False, "delete it to have it prepared anew")]
)
def test_a_refusal_says_what_helps(tmp_path, corpus, has_begun, advice):
    prepare(config(corpus), tmp_path / "store")
    with pytest.raises(InputError, match=advice):
        prepare(config(corpus, vocab_size=300), tmp_path / "store", has_begun=has_begun)
