"""The epoch's plan: every pair once, windows and epochs in one stream, and the same rows however they are asked for."""

import hashlib
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from tfm.config import InputError
from tfm.data.packing import Epochs, Plan, RowMemory
from tfm.data.permutation import hash64


class Table:
    """Lengths in memory."""

    def __init__(self, pairs, weight=1.0, name="memory", seed=0):
        self.name, self.weight = name, weight
        drawn = hash64(np.arange(pairs), key=seed)  # the same with every version of NumPy
        source = (2 + drawn % np.uint64(28)).astype(np.int64)
        change = (drawn >> np.uint64(32)) % np.uint64(7)
        self.sides = {"source": source, "target": np.maximum(source + change.astype(np.int64) - 3, 1)}

    def __len__(self):
        return len(self.sides["source"])

    def lengths(self, side, indices):
        return self.sides[side][indices].astype(np.int32)


def _plan(tables, seed=0, window_pairs=150, corpus="c0ffee", rows=(64, 64), memory=None):
    return Plan(tables, {"corpus_hash": corpus}, seed=seed, row_lengths=rows, window_pairs=window_pairs, memory=memory)


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _epoch_rows(plan, epoch):
    """First row of an epoch and of the next, found through the fraction alone."""
    row = 0
    while plan.epoch_of(row) < epoch:
        row += 1
    start = row
    while plan.epoch_of(row) < epoch + 1:
        row += 1
    return start, row


def test_every_pair_once_an_epoch_over_several_windows():
    plan = _plan([Table(1000)])
    assert plan.windows == 7
    orders = []
    for epoch in range(3):
        drawn = plan.rows(*_epoch_rows(plan, epoch))
        assert np.array_equal(np.sort(drawn.pairs), np.arange(1000))
        orders.append(drawn.pairs.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_rows_hold_what_fits():
    table = Table(1000)
    drawn = _plan([table]).rows(0, 300)
    assert len(drawn) == 300
    for side in ("source", "target"):
        filled = np.add.reduceat(table.lengths(side, drawn.pairs), drawn.offsets[:-1])
        assert filled.max() <= 64
        assert filled.min() > 0


def test_a_row_is_the_same_however_it_is_reached():
    table = Table(500)
    onward = _plan([table]).rows(0, 900)
    direct = _plan([table])
    assert _same(direct.rows(650, 700), onward.take(np.arange(650, 700)))
    assert _same(direct.rows(3, 9), onward.take(np.arange(3, 9)))  # backwards, past windows that were let go
    assert _same(direct.rows(0, 900), onward)


def test_rows_stream_across_windows_and_epochs():
    plan = _plan([Table(40)])
    _, end = _epoch_rows(plan, 0)
    across = plan.rows(end - 2, end + 3)
    assert len(across) == 5
    assert np.all(np.diff(across.offsets) > 0)
    assert _same(across.take(np.arange(2, 5)), plan.rows(end, end + 3))


def test_seed_corpus_and_row_lengths_change_the_plan():
    table = Table(500)
    base = _plan([table])
    others = [_plan([table], seed=1), _plan([table], corpus="beef"), _plan([table], rows=(64, 60))]
    for other in others:
        assert other.identity != base.identity
        assert not np.array_equal(other.rows(0, 20).pairs, base.rows(0, 20).pairs)


def test_the_plan_of_this_version_is_this_one():
    """Fails when the same corpus and seed give other rows: then PLAN_VERSION must go up, and this digest change."""
    plan = _plan([Table(700), Table(50, weight=2.5)])
    drawn = plan.rows(0, 400)
    content = [array.astype("<i8").tobytes() for array in drawn]
    assert plan.identity["plan_version"] == 1
    assert hashlib.sha256(b"".join(content)).hexdigest()[:16] == "b4bcce4434cbc0a4"


def test_tables_mix_by_weight():
    tables = [Table(100), Table(40, weight=2.5), Table(90, weight=0.5), Table(10, weight=0.01), Table(0)]
    epochs = Epochs(tables, key=1)
    assert epochs.draws == [100, 100, 45, 1, 0]
    counts = [np.zeros(len(table), int) for table in tables]
    for epoch in range(2):
        numbers, pairs = epochs.drawn(epoch, 0, epochs.length)
        assert np.bincount(numbers, minlength=5).tolist() == epochs.draws
        for table, pair in zip(numbers, pairs, strict=True):
            counts[table][pair] += 1
        if epoch == 0:
            assert set(counts[1]) == {2, 3}
    assert np.all(counts[0] == 2)
    assert np.all(counts[1] == 5)  # 2.5 passes an epoch: each pair exactly 5 times in two
    assert np.all(counts[2] == 1)
    assert counts[3].sum() == 2
    assert counts[3].max() == 1


def test_a_table_is_spread_over_the_whole_epoch():
    epochs = Epochs([Table(3000), Table(1000)], key=1)
    numbers, _ = epochs.drawn(0, 0, 4000)
    quarters = numbers.reshape(4, 1000).sum(axis=1)
    assert np.all(np.abs(quarters - 250) < 70)  # five standard deviations


def test_no_pair_at_all_is_refused():
    with pytest.raises(InputError, match=r"no pair to train on.*empty-corpus.*prepare"):
        _plan([Table(0, name="empty-corpus")])


def test_a_pair_longer_than_a_row_is_named():
    table = Table(300, name="text:x")
    table.sides["target"][123] = 65
    with pytest.raises(
        InputError, match=r"text:x: pair 123 has \d+ source and 65 target.*target_row_length=64.*1 such"
    ):
        _plan([table], window_pairs=1000).rows(0, 1)


def test_row_counts_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(RowMemory, "WORTH_SAVING", 0.0)
    monkeypatch.setattr(RowMemory, "TIMES_WRITING", 0)
    table = Table(1000)
    first = _plan([table], memory=tmp_path)
    expected = first.rows(600, 620)
    first._request(0).result()  # or the window that is planned ahead would still be writing its draft
    assert [path.name[:5] for path in tmp_path.iterdir()] == ["plan-"]

    resumed = _plan([table], memory=tmp_path)
    planned = []
    plan_window = resumed._plan_window
    monkeypatch.setattr(resumed, "_plan_window", lambda number: planned.append(number) or plan_window(number))
    assert _same(resumed.rows(600, 620), expected)
    resumed._request(0).result()  # the planner works in order: what the rows asked for is done by now
    assert len(planned) <= 4  # of more than 14 windows before that row: its own, the next one, and window 0
    assert _plan([table], seed=1, memory=tmp_path)._ends == []


def test_counts_recalled_from_a_checkpoint_save_the_counting(monkeypatch):
    tables = [Table(1000)]
    first = _plan(tables)
    far = first.rows(900, 910)
    second = _plan(tables)
    second.recall(first.counts())
    planned = []
    plan_window = Plan._plan_window
    monkeypatch.setattr(Plan, "_plan_window", lambda self, n: planned.append(n) or plan_window(self, n))
    assert _same(second.rows(900, 910), far)
    assert len(planned) <= 2 < len(first.counts())  # the window asked for, and the next one ahead


@pytest.mark.parametrize("damage", ["cut", "altered", "list", "bytes"])
def test_a_damaged_memory_is_not_used(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr(RowMemory, "WORTH_SAVING", 0.0)
    table = Table(1000)
    plan = _plan([table], memory=tmp_path)
    expected = plan.rows(300, 320)
    plan._planner.shutdown()  # the next window, planned in the background, would write the file again
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    altered = json.loads(content)
    altered["rows"][0] += 1
    damaged = {"cut": content[:-9], "altered": json.dumps(altered).encode(), "list": b"[1]", "bytes": b"\xff\xfe\x00"}
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert _same(_plan([table], memory=tmp_path).rows(300, 320), expected)
    assert "counted again" in caplog.text


def test_a_memory_that_lies_is_found_out(tmp_path):
    memory = RowMemory(None, {})
    memory.add(7, 0.1)
    memory.check(0, 7)
    with pytest.raises(InputError, match="window 0 has 7 rows, and it has 8"):
        memory.check(0, 8)


def test_an_unwritable_memory_only_warns(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(RowMemory, "WORTH_SAVING", 0.0)
    with caplog.at_level(logging.WARNING):
        rows = _plan([Table(500)], memory=tmp_path / "missing").rows(100, 110)
    assert _same(rows, _plan([Table(500)]).rows(100, 110))
    assert caplog.text.count("cannot be written") == 1


def test_an_error_does_not_stay_in_the_plan():
    table = Table(300)
    plan = _plan([table], window_pairs=1000)
    table.sides["source"][5] = 65
    with pytest.raises(InputError):
        plan.rows(0, 1)
    table.sides["source"][5] = 64
    assert len(plan.rows(0, 1)) == 1


def test_describe():
    described = _plan([Table(1000)], window_pairs=500).describe()
    assert described["pairs_per_epoch"] == 1000
    assert described["windows_per_epoch"] == 2
    assert 0 < described["source_padding"] < 0.2
    assert 0 < described["target_padding"] < 0.2


def test_planning_needs_no_jax():
    code = "import sys, tfm.data.packing; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fewer_counts_recalled_than_known_change_none():
    first, second = _plan([Table(1000)]), _plan([Table(1000)])
    first.rows(0, 900)
    second.rows(0, 1)
    second.recall(first.counts())
    assert second.counts()[: len(first.counts())] == first.counts()
