"""Directories that are being filled with a token store: for one process alone, and gone where that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from tfm.config import InputError

MARKER = ".tfm-partial"
"""Empty file in a directory that is being filled."""

_SCRATCH = "tfm-scratch-"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A new directory, or one that a killed process left, emptied, for this process alone; it goes at an error.

    It holds `MARKER` from the beginning on, which is for the caller to remove where the directory is kept. Raises
    InputError, and touches nothing, where there is something in it and no such file, or a living process uses it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{directory}: another process is preparing this token store; wait for it") from error
        except OSError as error:
            _log.warning("%s: cannot be locked (%s); prepare it in one process alone", directory, error.strerror)
        _empty(directory)
        try:
            yield
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _empty(directory: Path) -> None:
    """Removes what a killed process left, and says by `MARKER` whose the directory is."""
    left = sorted(entry.name for entry in directory.iterdir() if entry.name != MARKER)
    if left and not (directory / MARKER).exists():
        raise InputError(
            f"{directory}: the token store is to be built there, and it holds {left[0]}, which is none of its files: "
            "move it away, or name another data.store"
        )
    (directory / MARKER).touch()
    for name in left:
        (directory / name).unlink()


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Makes a directory, and waits until no other process of this machine is in here with it.

    Where its disk has no locks, nobody waits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new directory below `parent`, which goes at the end; those that killed processes have left there go now."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_SCRATCH}*"):
        with _held(left, without_locks=False) as is_mine:
            if is_mine:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        with _held(path, without_locks=True) as is_mine:
            if not is_mine:  # another process, at its start, took it for one that was left
                continue
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


@contextlib.contextmanager
def _held(directory: Path, without_locks: bool) -> Iterator[bool]:
    """Locks a directory; whether it is there, and no other process has it. `without_locks` where the disk has none."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # the latter of another user's
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield without_locks
            return
        yield directory.exists()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written(path: epath.Path | Path) -> Iterator[None]:
    """Turns a full disk, a missing right and the like into an InputError that names the place."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{path}: the token store takes a package that is missing ({error}); install it, or set up anew"
        ) from error
    except OSError as error:
        if error.filename is not None and not _on_one_way(error.filename, path):
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
        raise InputError(
            f"{path}: the token store cannot be written ({error}); make room or make it writable, or name another "
            "place with data.store or data.cache_dir"
        ) from error


def _on_one_way(*paths: str | os.PathLike[str]) -> bool:
    """Whether one of two paths is the other, below it or above it."""
    one, other = (Path(os.path.abspath(path)) for path in paths)
    return one == other or one in other.parents or other in one.parents
