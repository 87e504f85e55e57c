"""Paths, and files that are whole or absent."""

import errno
import os
from pathlib import Path

import fsspec.config
import pytest

from tests.disk import to_disk
from tfm.config import InputError
from tfm.files import as_path, at_home, remove_tree, write_atomically


def test_an_object_store_is_asked_anew_each_time():
    """Others write there, too."""
    path = as_path("gs://bucket/run")
    assert str(path) == "gs://bucket/run" and not isinstance(path, Path)
    assert not fsspec.config.conf["gs"]["use_listings_cache"] and not fsspec.config.conf["gcs"]["use_listings_cache"]


def test_an_address_of_no_known_kind_is_refused():
    with pytest.raises(InputError, match=r"^nowhere://bucket/run: no kind of address"):
        as_path("nowhere://bucket/run")


def test_a_local_path_is_absolute_and_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert as_path("~/run") == as_path("run") == tmp_path / "run"
    with pytest.raises(InputError, match="no home directory"):
        at_home(Path("~nobody-of-this-name/run"))


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"third")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["file"]


def test_what_a_link_leads_to_is_not_removed_with_it(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path) == ["kept"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after_it(tmp_path, monkeypatch):
    done = to_disk(monkeypatch)
    write_atomically(tmp_path / "file", b"x")
    assert done == [f"{tmp_path}/.file.{os.getpid()}.tmp", f"replace {tmp_path}/file", str(tmp_path)]
