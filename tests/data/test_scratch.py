"""Directories that are being filled: whose they are, what a kill leaves of them, and what an error says."""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from tfm.config import InputError
from tfm.data import scratch as module
from tfm.data.scratch import locked, one_at_a_time, scratch, written


def test_a_directory_is_for_one_process_and_goes_at_an_error(tmp_path):
    place = tmp_path / "store.partial"
    with pytest.raises(RuntimeError, match="killed"), locked(place):
        (place / "file").write_text("half")
        with pytest.raises(InputError, match="another process is preparing"), locked(place):
            pytest.fail("two at once")
        raise RuntimeError("killed")
    assert not place.exists()
    with locked(place):
        pass
    assert place.exists()


def test_one_process_waits_for_another(tmp_path):
    place, order = tmp_path / "new" / "cache", []

    def second():
        with one_at_a_time(place):
            order.append("second")

    thread = threading.Thread(target=second)
    with one_at_a_time(place):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_scratch_goes_at_the_end_and_what_was_abandoned_at_the_start(tmp_path):
    abandoned = tmp_path / "tfm-scratch-abandoned"
    abandoned.mkdir()
    (tmp_path / "kept").mkdir()
    with scratch(tmp_path) as first:
        assert not abandoned.exists()
        with scratch(tmp_path) as second:  # another's, which is alive, stays
            assert first.is_dir() and second.is_dir() and first != second
        assert first.is_dir() and not second.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_disk_without_locks_has_scratch_and_nothing_is_taken_away(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with locked(tmp_path / "store"):
        pass
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "tfm-scratch-somebody").mkdir()
    with scratch(tmp_path) as place:
        assert place.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["tfm-scratch-somebody"]


def test_a_scratch_that_another_process_took_for_abandoned_is_made_anew(tmp_path, monkeypatch):
    lock, taken = fcntl.flock, []

    def first_is_taken(descriptor, how):
        if not taken:
            taken.append(descriptor)
            raise BlockingIOError
        lock(descriptor, how)

    monkeypatch.setattr(module.fcntl, "flock", first_is_taken)
    with scratch(tmp_path) as place:
        assert place.is_dir() and taken


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space", "/data/store/0.shard"),
            "/data/store: the token store cannot be",
        ),
        (
            OSError(errno.ENOSPC, "No space"),
            "/data/store: the token store cannot be written .*make room",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), "/data/store: the token store cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied", "/corpus/train.en"), "^/corpus/train.en: cannot be read"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/train.en"), "^/data/train.en: cannot be read"),
        (ImportError("import of num2words halted"), "/data/store: .* a package that is missing .import of num2words"),
    ],
)
def test_what_an_error_says(error, message):
    with pytest.raises(InputError, match=message), written(Path("/data/store")):
        raise error
