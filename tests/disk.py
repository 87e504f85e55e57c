"""What reaches the disk, and in which order."""

import os

import pytest


def to_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the path of each fsync and by `replace PATH` of each rename, as they happen."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        fsync(descriptor)
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def noted_replace(old, new):
        replace(old, new)
        done.append(f"replace {new}")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return done
