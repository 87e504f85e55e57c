"""What a finished checkpoint consists of: every file by name, size and SHA-256, and the check that it is still so.

Knows files only: neither JAX nor Orbax. `tfm.checkpoint` writes a manifest last and reads nothing that does not match.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tfm.files import remove_tree, sync_directory, write_atomically

if TYPE_CHECKING:
    from tfm.files import AnyPath

NAME = "manifest.json"
FORMAT = 1
FileHashes = dict[str, dict[str, Any]]  # relative name -> {"sha256": hex, "size": bytes}
_CHUNK = 1 << 20  # bytes hashed at a time
_LEFT_BEHIND = re.compile(r"\.manifest\.json\.\d+\.tmp")  # by `write_atomically`, killed: nothing ever reads it
_SHARES = ".hashes"  # the hosts' shares of the hashes, on their way to the host that writes the manifest


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the files and what is wrong with each."""


class Changed(Damaged):
    """All files are there, and one has other bytes."""


class Unfinished(Exception):
    """A directory without a manifest: the save was interrupted, or the manifest is gone."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One finished checkpoint."""

    step: int
    metadata: dict[str, Any]
    """What the caller stored beside the state; plain JSON."""
    metric: float | None
    """Validation result of this step, where it was evaluated."""
    best: str
    """Which metric is better: higher or lower."""
    tokenizer_sha256: str | None
    """The tokenizer that the parameters belong to."""
    arrays: dict[str, str]
    """Every leaf of the state: path -> type and shape, such as float32[512,64]."""
    files: FileHashes
    """Every file but the manifest: path -> its sha256 (hex) and size (bytes)."""
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """JSON whose last field is the SHA-256 of the rest, so that a damaged manifest shows as well."""
        fields = dataclasses.asdict(self)
        plain = json.dumps(fields, indent=1, allow_nan=False, sort_keys=True)
        digest = hashlib.sha256(plain.encode()).hexdigest()
        return (json.dumps(fields | {"~sha256": digest}, indent=1, allow_nan=False, sort_keys=True) + "\n").encode()


def read(directory: AnyPath) -> Manifest:
    """The manifest of a checkpoint. Raises Unfinished where there is none, Damaged where it is not as written."""
    path = directory / NAME
    if isinstance(path, Path) and (path.is_symlink() or directory.is_symlink()):
        raise Damaged(f"{NAME if path.is_symlink() else 'the directory'} is a link")
    try:
        if not path.exists():
            raise Unfinished(f"no {NAME}")
        data = path.read_bytes()
        fields = json.loads(data)
        fields.pop("~sha256")
        if fields["format"] != FORMAT:
            raise Damaged(f"{NAME} has format {fields['format']!r}, and this version reads {FORMAT}")
        manifest = Manifest(**fields)
        intact = manifest.to_bytes() == data
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read ({error})") from error
    if not intact:
        raise Damaged(f"{NAME} does not match its own checksum")
    if str(manifest.step) != directory.name:
        raise Damaged(f"{NAME} is that of step {manifest.step}")
    return manifest


def list_steps(checkpoints: AnyPath) -> list[int]:
    """The steps that have a directory, finished or not, damaged or not; [] where `checkpoints` is missing."""
    if not checkpoints.exists():
        return []
    names = (entry.name for entry in checkpoints.iterdir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def write(directory: AnyPath, manifest: Manifest) -> None:
    """Finishes a checkpoint: from here on it counts. Raises OSError."""
    write_atomically(directory / NAME, manifest.to_bytes())
    if isinstance(directory, Path):
        sync_directory(directory.parent)


def list_files(directory: AnyPath, but: tuple[str, ...] = (NAME,)) -> dict[str, int]:
    """Relative name -> size in bytes of every file below `directory`, `but` for these entries directly in it.

    Raises Damaged at a link, or at anything else that is neither a file nor a directory.
    """
    files: dict[str, int] = {}
    if isinstance(directory, Path):
        _list_local(directory, "", but, files)
        return files
    _list_remote(directory, "", but, files)
    return files


def hash_files(directory: AnyPath, names: Iterable[str], threads: int = 1, sync: bool = False) -> FileHashes:
    """SHA-256 and size of each named file, as a manifest has them.

    `sync` also makes sure that the files are on the disk. Raises OSError.
    """

    def hash_file(name: str) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        with _open(directory / name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)  # lets other threads run meanwhile
                size += len(chunk)
            if sync and isinstance(directory, Path):
                os.fsync(file.fileno())
        return {"sha256": digest.hexdigest(), "size": size}

    names = list(names)
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        hashes = dict(zip(names, pool.map(hash_file, names), strict=True))
    if sync and isinstance(directory, Path):
        for parent in {(directory / name).parent for name in names}:
            sync_directory(parent)
    return hashes


def share_of(files: dict[str, int], index: int, count: int) -> list[str]:
    """Host `index`'s share of the files among `count` hosts: disjoint, together all of them, alike in bytes."""
    return sorted(files, key=lambda name: (-files[name], name))[index::count]


def verify(directory: AnyPath, manifest: Manifest, index: int = 0, count: int = 1) -> None:
    """Raises Damaged, naming files, unless `directory` is what the manifest says.

    Names, kinds and sizes are all checked; the bytes only of the share of host `index` among `count`.
    """
    problems = []
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{NAME} names {name}, which is outside the checkpoint")
    try:
        found = list_files(directory)
    except OSError as error:  # taken away meanwhile, by a run that keeps training
        raise Damaged(f"{error.filename or directory} cannot be read ({error.strerror or error})") from error
    problems += [f"{name} is missing" for name in sorted(manifest.files.keys() - found.keys())]
    problems += [f"{name} does not belong there" for name in sorted(found.keys() - manifest.files.keys())]
    for name, size in found.items():
        if name in manifest.files and size != manifest.files[name]["size"]:
            problems.append(f"{name} has {size} bytes in place of {manifest.files[name]['size']}")
    if not problems:
        threads = min(8, os.cpu_count() or 1)
        try:
            hashes = hash_files(directory, share_of(found, index, count), threads)
        except OSError as error:
            raise Damaged(f"{error.filename} cannot be read ({error.strerror})") from error
        changed = [name for name in hashes if hashes[name] != manifest.files[name]]
        if changed:
            raise Changed(_of_some([f"{name} has other content than was written" for name in changed]))
    if problems:
        raise Damaged(_of_some(problems))


def _of_some(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def hash_share(directory: AnyPath, index: int, count: int) -> FileHashes:
    """Hashes of host `index`'s share of what was just saved into `directory`, which is now on the disk."""
    return hash_files(directory, share_of(list_files(directory, but=(_SHARES,)), index, count), sync=True)


def hand_over(directory: AnyPath, index: int, share: FileHashes | None) -> None:
    """Hands a host's share, None when it could not be had, to the host that writes the manifest."""
    shares = directory / _SHARES
    shares.mkdir(parents=True, exist_ok=True)
    content = json.dumps(share).encode()
    if not isinstance(directory, Path):
        write_atomically(shares / f"{index}.json", content)
        return
    # In one move, and nothing behind it: once all are there, the directory is taken away.
    partial = shares / f".{index}.partial"
    partial.write_bytes(content)
    os.replace(partial, shares / f"{index}.json")


def take_over(directory: AnyPath, count: int) -> list[FileHashes | None] | None:
    """What hosts 1 to `count` - 1 handed over, or None while one of them is still at it; removes it once all are there.

    Through files, and not a collective: this happens in a thread, beside the training loop's own collectives. The
    directory was made by this save, so nothing in it can be left from an earlier one.
    """
    paths = [directory / _SHARES / f"{index}.json" for index in range(1, count)]
    if not all(path.exists() for path in paths):
        return None
    shares = [json.loads(path.read_bytes()) for path in paths]
    remove_tree(directory / _SHARES)
    return shares


def _list_local(directory: Path, prefix: str, but: tuple[str, ...], files: dict[str, int]) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if name in but or _LEFT_BEHIND.fullmatch(name):
                continue
            if entry.is_symlink():
                raise Damaged(f"{name} is a link to {os.readlink(entry.path)}")
            if entry.is_dir(follow_symlinks=False):
                _list_local(Path(entry.path), f"{name}/", but, files)
            elif entry.is_file(follow_symlinks=False):
                files[name] = entry.stat(follow_symlinks=False).st_size
            else:
                raise Damaged(f"{name} is neither a file nor a directory")


def _list_remote(directory: AnyPath, prefix: str, but: tuple[str, ...], files: dict[str, int]) -> None:
    for path in directory.iterdir():
        name = prefix + path.name
        if name in but:
            continue
        if path.is_dir():
            _list_remote(path, f"{name}/", but, files)
        else:
            files[name] = path.stat().length


def _open(path: AnyPath) -> Any:
    if not isinstance(path, Path):
        return path.open("rb")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))
