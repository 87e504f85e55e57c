"""The token store: every pair's token ids, written once by `prepare`, hashed, and memory-mapped from then on.

store/
  manifest.json          written last: fields, sources, tables, report, sizes and SHA-256 of every file
  tokenizer.model
  0-train-00000.shard    up to a million pairs of table 0, split "train"
  1-validation.source    text of a validation split, a line a pair, for scores; and .target
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

from etils import epath

from tfm.config import Config, InputError
from tfm.data.checks import CorpusReport
from tfm.data.corpus import Corpus, file_identity, file_stamp, open_corpora, parse_spec
from tfm.data.scratch import MARKER, locked, one_at_a_time, scratch, written
from tfm.data.shards import FORMAT, MANIFEST, TOKENIZER, PairTable, map_shard
from tfm.data.store_builder import build_store
from tfm.data.tokenizer import NO_NORMALIZATION, Tokenizer
from tfm.files import as_epath, at_home

# What a store depends on: a store prepared with other values of these is another store.
_FIELDS = (
    *("corpus", "source_language", "target_language", "train_split", "validation_split"),
    *("source_row_length", "target_row_length", "max_length_ratio", "drop_duplicates"),
    *("segmentations", "segmentation_alpha"),
)
_TOKENIZER_FIELDS = ("vocab_size", "tokenizer_sample", "tokenizer_model")
_OTHER_FILES = 512  # that a process may have open beside a store's

_log = logging.getLogger(__name__)


class TokenStore:
    """An opened store: tables of pairs by split, the tokenizer, and the report of what `prepare` found."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self._tables: dict[str, list[PairTable]] = {}
        _allow_open_files(sum(len(table["shards"]) for table in manifest["tables"]))
        for table in manifest["tables"]:
            shards = [map_shard(directory / shard["file"], shard["arrays"]) for shard in table["shards"]]
            self._tables.setdefault(table["split"], []).append(PairTable(table["name"], table["weight"], shards))

    def tables(self, split: str) -> list[PairTable]:
        """The tables of a split, one a corpus that has it. Raises InputError at a split that isn't stored."""
        if split not in self._tables:
            raise InputError(f"{self.directory}: holds no split {split!r}, only {', '.join(self._tables)}")
        return self._tables[split]

    def text(self, split: str, most: int | None = None) -> list[tuple[str, str]]:
        """Source and target text of a validation split, `most` pairs at most: of several corpora, from each in turn."""
        of_tables: list[list[tuple[str, str]]] = []
        for table in self.manifest["tables"]:
            if table["split"] == split and table["text"]:
                sides = [(self.directory / file).read_bytes().decode().split("\n")[:-1] for file in table["text"]]
                of_tables.append(list(zip(*sides, strict=True)))
        in_turn = (pair for pairs in itertools.zip_longest(*of_tables) for pair in pairs if pair is not None)
        return list(itertools.islice(in_turn, most))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / TOKENIZER

    @property
    def report(self) -> CorpusReport:
        return CorpusReport.from_dict(self.manifest["report"])

    @functools.cached_property
    def corpus_hash(self) -> str:
        """Hex SHA-256 over tokens, tokenizer, splits and weights: stores with the same one give the same batches."""
        tables = [
            [table["split"], table["weight"], [shard["sha256"] for shard in table["shards"]]]
            for table in self.manifest["tables"]
        ]
        content = json.dumps([FORMAT, self.manifest["files"][TOKENIZER]["sha256"], tables])
        return hashlib.sha256(content.encode()).hexdigest()

    def verify(self) -> None:
        """Reads every file and compares its SHA-256. Raises InputError naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            if file_sha256(self.directory / name) != entry["sha256"]:
                raise InputError(
                    f"{self.directory / name}: its content is not what the manifest says; delete the store "
                    f"{self.directory} and prepare it anew"
                )


def open_store(directory: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> TokenStore:
    """Opens a store, out of its copy in `cache_dir` if that is given, and checks that its files have their sizes.

    The copy is made, and its hashes compared, by the first process that asks for it. Raises InputError naming what is
    missing, cut short or another format, and where a store that isn't on a local disk has no `cache_dir`.
    """
    root = as_epath(directory)
    path = root / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise InputError(f"{path}: format {manifest['format']}, not {FORMAT}; delete {root} and prepare it anew")
        if cache_dir is not None or _is_remote(root):
            local = _cached(root, content, manifest, _cache_of(root, cache_dir))
        else:
            local = Path(root)
        for name, entry in manifest["files"].items():
            size = (local / name).stat().st_size if (local / name).is_file() else None
            if size != entry["bytes"]:
                found = "missing" if size is None else f"{size} bytes long, not {entry['bytes']}"
                raise InputError(f"{local / name}: {found}; delete the store {local} and prepare it anew")
        return TokenStore(local, manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the manifest of a token store ({error!r}); prepare it anew") from error
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise InputError(f"{root}: this process may not open as many files as it has: raise `ulimit -n`") from error
        raise InputError(f"{path}: no token store can be read here ({error}); prepare it") from error


def _allow_open_files(count: int) -> None:
    """Raises this process's limit where so many more would exceed it: each mapped file keeps its descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _cache_of(root: epath.Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is None:
        raise InputError(f"{root}: is not on a local disk; set data.cache_dir to a directory that can hold a copy")
    return at_home(Path(cache_dir))


def _cached(root: epath.Path, content: bytes, manifest: dict[str, Any], cache_dir: Path) -> Path:
    """The store's copy below `cache_dir`, named after its manifest's hash; made if it isn't there yet."""
    local = cache_dir / f"store-{hashlib.sha256(content).hexdigest()[:16]}"
    if (local / MANIFEST).exists():
        return local
    with written(cache_dir), one_at_a_time(cache_dir), scratch(cache_dir) as place:
        if (local / MANIFEST).exists():  # made while this process waited
            return local
        partial = place / local.name
        partial.mkdir()
        for name, entry in manifest["files"].items():
            (root / name).copy(partial / name)
            if file_sha256(partial / name) != entry["sha256"]:
                raise InputError(f"{root / name}: its content is not what the manifest says; prepare it anew")
        (partial / MANIFEST).write_bytes(content)
        try:
            os.rename(partial, local)
        except OSError as error:  # where there are no locks, another process of this host was faster
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    return local


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store_directory(config: Config, workdir: str | os.PathLike[str]) -> str:
    """Where the run's token store is: data.store, or WORKDIR/store."""
    return os.path.expanduser(config.data.store or os.path.join(workdir, "store"))


def prepare(
    config: Config,
    directory: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None = None,
    has_begun: bool = False,
) -> TokenStore:
    """Checks the corpora, trains the tokenizer, tokenizes once, and returns the opened store `directory`.

    A store that is there already is used if it was prepared with the same fields from the same files, and is refused
    with an InputError naming what differs if not: what to do depends on whether a run `has_begun` with it.
    `tokenizer_path` stands in for `data.tokenizer`. The store is built aside and renamed (or, to gs://, uploaded with
    the manifest last), so that an interrupted call leaves none. Raises InputError at bad input, and where the store
    cannot be written.
    """
    root = as_epath(directory)
    given = tokenizer_path or config.data.tokenizer
    tokenizer = Tokenizer.load(given) if given else None
    if tokenizer is not None and (rule := tokenizer.normalization) != NO_NORMALIZATION:
        _log.warning(
            "%s: rewrites text by the rule %s, and so will translations be; --normalization_rule_name=%s keeps it",
            *(given, rule, NO_NORMALIZATION),
        )
    fields = _fields(config, tokenizer)
    corpora = open_corpora(config.data)
    if tokenizer is not None and tokenizer.vocab_size != config.data.vocab_size:
        _log.info("%s has %d pieces, whatever data.vocab_size says", given, tokenizer.vocab_size)
    with written(root):
        is_there = (root / MANIFEST).exists()
    if is_there:
        _refuse_other(root, fields, has_begun)
    elif _is_remote(root):
        cache_dir = _cache_of(root, config.data.cache_dir)
        with written(root), scratch(cache_dir) as place:
            build_store(config, corpora, place, tokenizer, fields)
            for path in sorted(place.iterdir(), key=lambda path: path.name == MANIFEST):
                epath.Path(path).copy(root / path.name, overwrite=True)
    else:
        _build_aside(config, corpora, Path(os.path.realpath(root)), tokenizer, fields)
    return open_store(directory, config.data.cache_dir)


def _build_aside(
    config: Config, corpora: list[Corpus], directory: Path, tokenizer: Tokenizer | None, fields: dict[str, Any]
) -> None:
    """Builds the store beside `directory`, and renames it when it is whole."""
    with written(directory):
        in_the_way = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if in_the_way:
        raise InputError(f"{directory}: is in the way, and is no token store; name another data.store, or remove it")
    if directory.is_mount():  # nothing can be renamed to it
        raise InputError(f"{directory}: is a whole disk of its own; name a directory on it with data.store")
    partial = directory.with_name(directory.name + ".partial")
    with written(partial), locked(partial):
        build_store(config, corpora, partial, tokenizer, fields)
        os.replace(partial, directory)
        (directory / MARKER).unlink()


def _fields(config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the store depends on, as JSON reads it back."""
    fields = {f"data.{name}": getattr(config.data, name) for name in _FIELDS}
    if tokenizer is None:
        fields |= {f"data.{name}": getattr(config.data, name) for name in _TOKENIZER_FIELDS}
    else:
        fields["data.tokenizer"] = tokenizer.sha256
    if any(parse_spec(text).tag for text in config.data.corpus):
        fields["text"] = "tagged"  # as it was not, at first
    return json.loads(json.dumps(fields))


def _refuse_other(root: epath.Path, fields: dict[str, Any], has_begun: bool) -> None:
    """Raises InputError where the store was prepared with other fields, or from files that have changed since."""
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
        stored, sources = manifest["fields"], manifest["sources"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{root / MANIFEST}: not the manifest of a token store ({error!r}); delete {root}") from error
    other = [
        f"{name}={stored.get(name)!r} there and {fields.get(name)!r} here"
        for name in sorted(stored.keys() | fields.keys())
        if stored.get(name) != fields.get(name)
    ]
    other += [f"{entry['path']} has changed since" for entry in sources if _has_changed(entry)]
    if other:
        anew = "delete it to have it prepared anew, or name another with data.store"
        back = "put back what has changed, for the run has begun with it, or use another --workdir and data.store"
        raise InputError(
            f"{root}: holds a token store prepared otherwise ({'; '.join(other)}); {back if has_begun else anew}"
        )


def _has_changed(entry: dict[str, Any]) -> bool:
    """Whether a source file is there and is another one; a store can be used where its sources are not."""
    path = epath.Path(entry["path"])
    if not path.exists():
        return False
    stamp = file_stamp(path)
    if stamp["bytes"] != entry["bytes"]:
        return True
    return stamp["mtime_ns"] != entry["mtime_ns"] and file_identity(path)["sha256"] != entry["sha256"]
