"""Pairs in shards: many read as one, none without pairs, and those that lie in memory."""

import types

import numpy as np

from tests.data.stores import config, source_lengths
from tfm.data import checks, shards, store_builder
from tfm.data.shards import PairTable, Shard, StoreWriter, map_shard
from tfm.data.store import prepare


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


def test_ids_of_a_large_vocabulary_are_whole(tmp_path):
    writer = StoreWriter(tmp_path, types.SimpleNamespace(vocab_size=70_000, model=b""))
    writer.start_table("corpus", "train")
    ids, lengths = np.array([69_999, 1]), np.array([2])
    writer.append(ids, lengths, ids, lengths)
    writer.finish()
    [shard] = writer.tables[0]["shards"]
    assert map_shard(tmp_path / shard["file"], shard["arrays"]).side("source", 0).tolist() == [69_999, 1]
