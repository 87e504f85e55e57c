"""Files and directories, on local disks and in object stores; without JAX, so that `--help` can use it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfm.config import InputError

if TYPE_CHECKING:
    from etils import epath

    AnyPath = Path | epath.Path

GZIP = b"\x1f\x8b\x08"  # how a gzip file begins
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the operating system says of a disk without room


def as_path(path: str | os.PathLike[str]) -> Any:
    """An absolute pathlib.Path, or an epath.Path (which has its methods) of an address such as gs://bucket/run."""
    if "://" in (address := os.fspath(path)):
        import fsspec.config

        # Listings are kept for ever there, and a host would never see what another one writes.
        for protocol in (address.partition("://")[0], "gcs"):  # gs:// is opened under either name
            fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
        return as_epath(path)
    return at_home(Path(path)).absolute()


def as_epath(path: str | os.PathLike[str]) -> epath.Path:
    """The path or address as it is. Raises InputError at an address of a kind that cannot be read."""
    from etils import epath

    try:
        return epath.Path(path)
    except KeyError as error:
        raise InputError(f"{path}: no kind of address that can be read: give gs://, s3:// or a path") from error


def at_home(path: Path) -> Path:
    """The path with the home directory for ~. Raises InputError where that is of nobody."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no home directory of that name: write the path out") from error


def write_atomically(path: AnyPath, data: bytes) -> None:
    """Writes the whole file or leaves what was there. On return it is on the disk, not only in its cache."""
    if not isinstance(path, Path):
        path.write_bytes(data)  # an object store shows an object only once it is whole
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a local directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: AnyPath) -> None:
    """Removes a directory with all that is in it, as far as it can be; links are removed, never followed."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.rmtree(missing_ok=True)


def without_client(path: AnyPath, error: ImportError) -> InputError:
    """The one line for an address whose object store takes a package that isn't installed."""
    reason = " ".join(str(error).split())
    return InputError(f"{path}: cannot be reached ({reason}): for gs://, .venv/bin/pip install -e '.[gcs]'")
