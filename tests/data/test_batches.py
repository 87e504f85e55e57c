"""Batches: what stands in a packed row, the same for every way of asking, on NumPy and on the mesh."""

import dataclasses
import logging
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tfm.config import Config, DataConfig, InputError, TrainingConfig
from tfm.data.batches import Batch, TrainBatches, validation_batches
from tfm.data.packing import Rows
from tfm.data.tokenizer import BOS, EOS


class Table:
    """Pairs in memory; the ids of pair i are 1000 + i, so that each token says whose it is."""

    weight = 1.0
    name = "memory"

    def __init__(self, pairs, longest=20):
        rng = np.random.default_rng(pairs)
        self.sides = dict(zip(("source", "target"), rng.integers(2, longest + 1, (2, pairs)), strict=True))

    def __len__(self):
        return len(self.sides["source"])

    def lengths(self, side, indices):
        return self.sides[side][indices].astype(np.int32)

    def pair(self, index):
        return tuple(
            np.append(np.full(self.sides[s][index] - 1, 1000 + index), EOS).astype(np.uint16) for s in self.sides
        )


class Store:
    directory = None
    corpus_hash = "c0ffee"

    def __init__(self, *tables):
        self._tables = list(tables)

    def tables(self, split):
        assert split in ("train", "validation")
        return self._tables


def _config(rows=8, length=32, seed=0, window_pairs=100, read_ahead=4):
    return Config(
        data=DataConfig(
            source_row_length=length, target_row_length=length, window_pairs=window_pairs, read_ahead=read_ahead
        ),
        training=TrainingConfig(target_tokens_per_batch=rows * length, seed=seed),
    )


def _train(pairs=250, **fields):
    return TrainBatches(Store(Table(pairs)), "train", _config(**fields))


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class _Written:
    """A table of two pairs, written out, and rows as they are wanted."""

    weight, name = 1.0, "written"
    pairs = (([11, 12, EOS], [21, EOS]), ([13, EOS], [22, 23, 24, EOS]))

    def __len__(self):
        return 2

    def lengths(self, side, indices):
        return np.array([len(self.pairs[i][side == "target"]) for i in indices], np.int32)

    def pair(self, index):
        return tuple(np.array(side, np.uint16) for side in self.pairs[index])


def test_rows_by_hand(monkeypatch):
    batches = TrainBatches(Store(_Written()), "train", _config(rows=2, length=8))
    rows = Rows(np.array([0, 1, 3]), np.zeros(3, np.int32), np.array([1, 0, 1]))
    monkeypatch.setattr(batches, "_rows", lambda k: rows)
    batch = batches.host_batch(0)
    expected = Batch(
        source_tokens=[[13, 1, 0, 0, 0, 0, 0, 0], [11, 12, 1, 13, 1, 0, 0, 0]],
        source_segments=[[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 2, 2, 0, 0, 0]],
        source_positions=[[0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 1, 0, 0, 0]],
        target_inputs=[[2, 22, 23, 24, 0, 0, 0, 0], [2, 21, 2, 22, 23, 24, 0, 0]],
        target_outputs=[[22, 23, 24, 1, 0, 0, 0, 0], [21, 1, 22, 23, 24, 1, 0, 0]],
        target_segments=[[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 0, 0]],
        target_positions=[[0, 1, 2, 3, 0, 0, 0, 0], [0, 1, 0, 1, 2, 3, 0, 0]],
        rows=[0, 1],
    )
    for name, array in batch._asdict().items():
        assert array.dtype == np.int32
        assert array.tolist() == getattr(expected, name), name


def test_pairs_stay_together_and_come_once_an_epoch():
    batches = _train()
    seen = []
    k = 0
    while batches.epoch(k) < 1:
        batch = batches.host_batch(k)
        for row in range(8):
            for segment in range(1, batch.source_segments[row].max() + 1):
                source = batch.source_tokens[row][batch.source_segments[row] == segment]
                target = batch.target_outputs[row][batch.target_segments[row] == segment]
                inputs = batch.target_inputs[row][batch.target_segments[row] == segment]
                pair = int(source[0]) - 1000
                expected = batches.tables[0].pair(pair)
                assert source.tolist() == expected[0].tolist()
                assert target.tolist() == expected[1].tolist()
                assert inputs.tolist() == [BOS, *expected[1][:-1].tolist()]
                seen.append(pair)
        k += 1
    assert sorted(seen[:250]) == list(range(250))  # batches past the epoch's end begin the next one
    assert len(seen) > 250


def test_batch_k_is_the_same_by_iterating_and_directly():
    iterated = {}
    batches = _train()
    for k in range(40):
        iterated[k] = batches.host_batch(k)
    for k in (39, 17, 0):
        assert _same(_train().host_batch(k), iterated[k])
    assert not np.array_equal(iterated[0].source_tokens, iterated[1].source_tokens)
    assert not np.array_equal(_train(seed=1).host_batch(0).source_tokens, iterated[0].source_tokens)


@pytest.mark.parametrize("rows", [range(2, 5), [7, 0, 3], slice(4, None), np.array([], int)])
def test_some_rows_are_those_of_the_whole_batch(rows):
    batches = _train()
    whole = batches.host_batch(3)
    wanted = list(range(8))[rows] if isinstance(rows, slice) else list(rows)
    some = batches.host_batch(3, rows)
    assert _same(some, [field[wanted] for field in whole])
    assert some.rows.tolist() == wanted


def test_global_batch_equals_host_batch():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    batches = _train(rows=2 * len(devices))
    for spec in (PartitionSpec("data"), PartitionSpec()):
        placed = batches.global_batch(5, NamedSharding(mesh, spec))
        assert _same(placed, batches.host_batch(5))
        assert placed.target_inputs.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_a_host_builds_only_the_rows_that_its_devices_hold(monkeypatch):
    device = jax.devices()[0]
    sharding = NamedSharding(jax.sharding.Mesh(np.array([device]), ("data",)), PartitionSpec("data"))
    batches = _train()
    asked = []
    host_batch = batches.host_batch
    monkeypatch.setattr(batches, "host_batch", lambda k, rows=None: asked.append(list(rows)) or host_batch(k, rows))
    monkeypatch.setattr(
        NamedSharding, "addressable_devices_indices_map", lambda self, shape: {0: (slice(6, 8),), 1: (slice(2, 4),)}
    )
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, part: (shape, part((slice(6, 8),)), part((slice(2, 4),))),
    )
    whole = host_batch(1)
    placed = batches.global_batch(1, sharding)
    assert asked == [[2, 3, 6, 7]]
    for field, (shape, upper, lower) in zip(whole, placed, strict=True):
        assert shape == field.shape
        assert np.array_equal(upper, field[6:8])
        assert np.array_equal(lower, field[2:4])


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def _wait_for_no_threads():
    deadline = time.monotonic() + 10
    while _threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _threads()


def test_read_ahead_keeps_the_order():
    batches = _train()
    read = list(batches.read_ahead(7, 30))
    assert [k for k, _ in read] == list(range(7, 30))
    assert all(_same(batch, batches.host_batch(k)) for k, batch in read)
    assert list(batches.read_ahead(5, 5)) == []
    assert _wait_for_no_threads()


def test_read_ahead_puts_batches_on_the_mesh():
    sharding = NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    batches = _train()
    for k, batch in batches.read_ahead(0, 3, sharding):
        assert isinstance(batch.rows, jax.Array)
        assert _same(batch, batches.host_batch(k))


def test_read_ahead_ends_with_its_consumer():
    reader = _train().read_ahead(0, 10**9)
    assert next(reader)[0] == 0
    assert _threads()
    reader.close()
    assert _wait_for_no_threads()


def test_an_error_in_a_thread_is_raised_at_its_batch(monkeypatch):
    batches = _train()
    host_batch = batches.host_batch

    def failing(k):
        if k == 3:
            raise InputError("batch 3 cannot be read")
        return host_batch(k)

    monkeypatch.setattr(batches, "host_batch", failing)
    reader = batches.read_ahead(0, 9)
    assert [next(reader)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="batch 3"):
        next(reader)
    assert _wait_for_no_threads()


def test_a_corpus_smaller_than_a_batch_repeats_and_warns(caplog):
    with caplog.at_level(logging.WARNING):
        batches = _train(pairs=3)
    assert "holds the same pairs more than once" in caplog.text
    batch = batches.host_batch(0)
    assert np.all(batch.source_segments[:, 0] == 1)  # every row is in use
    assert {1000, 1001, 1002} == set(batch.source_tokens[batch.source_tokens > EOS].tolist())
    assert batches.epoch(1) > 1


def test_description():
    batches = _train()
    described = batches.describe()
    assert described["pairs_per_epoch"] == 250
    assert described["rows_per_batch"] == 8
    assert set(batches.plan_identity) == {
        *("plan_version", "corpus_hash", "split", "seed", "source_row_length", "target_row_length"),
        *("window_pairs", "rows_per_batch"),
    }


@pytest.mark.parametrize("longest", [20, 70])
def test_validation_holds_every_pair_once_and_drops_none(longest):
    tables = [Table(90, longest), Table(0), Table(31, longest)]
    tables[2].weight = 0.1  # plays no part
    batches = validation_batches(Store(*tables), "validation", _config())
    longer = max(max(table.sides["source"].max(initial=0), table.sides["target"].max(initial=0)) for table in tables)
    assert batches.source_length == (32 if longer <= 32 else 128)
    rows = 8 if longer <= 32 else 1  # attention takes as much memory as in training, at most
    pairs = sides = 0
    for k in range(len(batches)):
        batch = batches.host_batch(k)
        assert batch.source_tokens.shape == (rows, batches.source_length)
        assert batch.target_inputs.shape == (rows, batches.target_length)
        assert np.array_equal(batch.source_segments.max(axis=1), batch.target_segments.max(axis=1))
        pairs += (batch.target_outputs == EOS).sum()
        sides += np.array([(batch.source_segments > 0).sum(), (batch.target_segments > 0).sum()])
    assert pairs == 121
    assert sides.tolist() == [sum(table.sides[side].sum() for table in tables) for side in ("source", "target")]
    assert [k for k, _ in batches.read_ahead(0, len(batches))] == list(range(len(batches)))
    assert rows == 1 or (batch.source_segments.max(axis=1) == 0).any()  # the last batch is filled up with empty rows
    with pytest.raises(IndexError):
        batches.host_batch(len(batches))


def test_a_validation_batch_is_no_larger_than_a_part_of_training_s():
    whole = _config()
    parts = dataclasses.replace(whole, training=dataclasses.replace(whole.training, gradient_accumulation=4))
    pairs = []
    for config, shards, rows in ((whole, 1, 8), (whole, 4, 8), (parts, 1, 2), (parts, 2, 2), (parts, 4, 4)):
        batches = validation_batches(Store(Table(90)), "validation", config, shards)
        assert batches.rows_per_batch == rows
        pairs.append(sum((batches.host_batch(k).target_outputs == EOS).sum() for k in range(len(batches))))
    assert pairs == [90] * 5


def test_a_validation_pair_that_takes_more_memory_than_training_is_named(caplog):
    table = Table(90)
    longest = int(table.sides["source"].argmax())
    assert validation_batches(Store(table), "validation", _config()) and not caplog.messages
    table.sides["source"][longest] = 500
    validation_batches(Store(table), "validation", _config())
    assert f"memory: validation pair {longest + 1} has 500 and " in caplog.text


def test_no_pair_to_validate_on_is_refused():
    with pytest.raises(InputError, match=r"no pair to validate on.*data\.validation_split"):
        validation_batches(Store(Table(0)), "validation", _config())
