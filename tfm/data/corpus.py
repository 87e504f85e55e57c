"""Where sentence pairs come from: text files, TFDS sets and the demo corpus, behind one interface.

A corpus yields pairs of *bytes*, as they stand in the file or the record, so that the checks can see what is wrong with
them; `to_text` makes text of one side. Everything streams: no corpus is ever held in memory.
"""

from __future__ import annotations

import abc
import dataclasses
import gzip
import hashlib
import io
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from tfm.config import DataConfig, InputError
from tfm.files import GZIP, as_epath

BOM = b"\xef\xbb\xbf"
_TAG = re.compile(r"<[^\s<>]+>")
_RESERVED_TAG = re.compile(r"<(pad|s|/s|unk|0x[0-9A-Fa-f]{2})>")
_FORMS = "text:PATTERN with {split} and {lang}, tfds:NAME/CONFIG or demo, each with ;weight=W and ;tag=<TAG> if wanted"
# Whatever any reader of lines might take for the end of one, and the tab that would end a column.
_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
# Halves of pairs, as Python makes of the bytes of a command line that are no UTF-8.
_SURROGATES = re.compile("[\ud800-\udfff]")

RawPair = tuple[bytes, bytes]

_MOST_PASSES = 1000


def to_text(raw: bytes) -> str:
    """One side of a pair as text without line breaks: invalid UTF-8 becomes U+FFFD, NUL goes, a break is a space."""
    return single_line(raw.decode("utf-8", errors="replace"))


def single_line(text: str) -> str:
    """Text without NUL, and with each run of line breaks and tabs made one space; blanks at both ends go.

    What is no text becomes U+FFFD.
    """
    if not text.isprintable():  # which is quick to ask, and hardly ever so
        text = _SURROGATES.sub("\ufffd", _BREAKS.sub(" ", text.replace("\0", "")))
    return text.strip()


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """One element of `data.corpus`, taken apart."""

    text: str
    kind: str
    location: str
    weight: float = 1.0
    tag: str | None = None


def parse_spec(text: str) -> CorpusSpec:
    """Takes `KIND:LOCATION;weight=W;tag=<TAG>` apart. Raises InputError where it has another form."""
    where, *options = text.split(";")
    kind, _, location = where.partition(":")
    if kind not in ("text", "tfds", "demo") or bool(location) == (kind == "demo"):
        raise InputError(f"data.corpus={text!r}: not a corpus; write {_FORMS}")
    weight, tag = 1.0, None
    for option in options:
        name, _, value = option.partition("=")
        if name == "weight":
            weight = _parse_weight(text, value)
        elif name == "tag":
            if not _TAG.fullmatch(value):
                raise InputError(f"data.corpus={text!r}: tag {value!r} must stand in angle brackets, such as <2de>")
            if _RESERVED_TAG.fullmatch(value):
                raise InputError(f"data.corpus={text!r}: tag {value!r} is a piece of every tokenizer; take another")
            tag = value
        else:
            raise InputError(f"data.corpus={text!r}: unknown option {option!r}; write ;weight=W or ;tag=<TAG>")
    return CorpusSpec(text, kind, location, weight, tag)


def _parse_weight(text: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= _MOST_PASSES:
        raise InputError(
            f"data.corpus={text!r}: weight {value!r} must be a number above 0, at most {_MOST_PASSES}: the passes over "
            "it in an epoch"
        )
    return weight


class Corpus(abc.ABC):
    """Sentence pairs of one origin, for one direction of translation."""

    def __init__(self, spec: CorpusSpec, source_language: str, target_language: str):
        self.spec = spec
        self.source_language = source_language
        self.target_language = target_language

    @property
    def name(self) -> str:
        return self.spec.text.partition(";")[0]

    @abc.abstractmethod
    def has_split(self, split: str) -> bool:
        """Whether the corpus has that split."""

    @abc.abstractmethod
    def where(self, split: str) -> str:
        """The split's files or set, for messages."""

    def lack(self, split: str) -> str:
        """Where a split that is not there was looked for, for messages."""
        return self.where(split)

    def check(self, split: str) -> None:  # noqa: B027 (not every kind has something to look at)
        """Raises InputError at what is known to be missing before anything is read."""

    @abc.abstractmethod
    def pairs(self, split: str) -> Iterator[RawPair]:
        """Streams (source, target) as bytes without the line's end. Raises InputError at what cannot be read."""

    @abc.abstractmethod
    def paths(self, split: str) -> list[epath.Path]:
        """The files that a split is read from; none where it is made by the package's own code."""

    def identity(self, split: str) -> list[dict[str, Any]]:
        """What tells a changed origin from the same one: for each file its path, bytes, mtime_ns and sha256."""
        return [file_identity(path) for path in self.paths(split)]


class TextCorpus(Corpus):
    """Text files, one sentence a line: two files, or one with source TAB target where PATTERN has no {lang}."""

    def paths(self, split: str) -> list[epath.Path]:
        """The source's and the target's file, or the one file of both."""
        languages = [self.source_language, self.target_language] if "{lang}" in self.spec.location else [""]
        return [
            as_epath(self.spec.location.replace("{split}", split).replace("{lang}", language)).expanduser()
            for language in languages
        ]

    def where(self, split: str) -> str:
        return " and ".join(str(path) for path in self.paths(split))

    def lack(self, split: str) -> str:
        if "{split}" not in self.spec.location:
            return f"{self.spec.location} has no {{split}} in it, and is for training alone"
        return self.where(split)

    def has_split(self, split: str) -> bool:
        # Without {split} the one file is the training text: validating on it would say nothing.
        return "{split}" in self.spec.location and any(path.exists() for path in self.paths(split))

    def check(self, split: str) -> None:
        for path in self.paths(split):
            if not path.exists():
                raise InputError(
                    f"{path}: no such file, which data.corpus={self.spec.text!r} names for the split {split!r}; "
                    "correct the pattern, data.train_split, data.validation_split or the languages"
                )

    def pairs(self, split: str) -> Iterator[RawPair]:
        self.check(split)
        paths = self.paths(split)
        return _columns(paths[0]) if len(paths) == 1 else parallel_lines(*paths)


def read_lines(path: epath.Path) -> Iterator[bytes]:
    """Streams a file's lines, plain or gzip by its first bytes; a line ends at b"\\n" alone, the last maybe without."""
    try:
        with path.open("rb") as opened, io.BufferedReader(opened) as file:  # a pipe, too, can be looked into
            is_packed = file.peek(len(GZIP)).startswith(GZIP)
            lines = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20) if is_packed else file
            for number, line in enumerate(lines):
                if number == 0:
                    line = line.removeprefix(BOM)
                yield line.removesuffix(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a readable plain or gzip text file") from error


def parallel_lines(source_path: epath.Path, target_path: epath.Path) -> Iterator[RawPair]:
    """Streams the lines of two files in pairs. Raises InputError where one has more of them, or cannot be read."""
    sources, targets = read_lines(source_path), read_lines(target_path)
    count = 0
    for source in sources:
        target = next(targets, None)
        if target is None:
            raise _unequal(source_path, count + 1 + sum(1 for _ in sources), target_path, count)
        count += 1
        yield source, target
    rest = sum(1 for _ in targets)
    if rest:
        raise _unequal(source_path, count, target_path, count + rest)


def _unequal(source_path: epath.Path, sources: int, target_path: epath.Path, targets: int) -> InputError:
    return InputError(
        f"{source_path} has {sources} lines and {target_path} has {targets}: line n of one must translate line n "
        "of the other; cut both files from the same pairs"
    )


def _columns(path: epath.Path) -> Iterator[RawPair]:
    for number, line in enumerate(read_lines(path), start=1):
        source, tab, target = line.partition(b"\t")
        if not tab and line.strip():
            raise InputError(f"{path}, line {number}: no tab; each line must be source TAB target")
        yield source, target.partition(b"\t")[0]  # further columns are scores and notes


def file_identity(path: epath.Path) -> dict[str, Any]:
    """Path, size, time of change and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"path": str(path), **file_stamp(path), "sha256": digest.hexdigest()}


def file_stamp(path: epath.Path) -> dict[str, int]:
    """What is cheap to know of a file: its size in bytes, and when it was changed (0 where the storage won't say)."""
    stat = path.stat()
    return {"bytes": int(stat.length), "mtime_ns": 0 if "://" in str(path) else os.stat(path).st_mtime_ns}


def open_corpora(data: DataConfig) -> list[Corpus]:
    """The corpora that `data.corpus` names, none of them read yet. Raises InputError at a spec of another form."""
    corpora: list[Corpus] = []
    for text in data.corpus:
        spec = parse_spec(text)
        kind: type[Corpus] = TextCorpus
        if spec.kind != "text":
            from tfm.data import tfds_corpus  # TFDS takes a second to import, and text files don't need it

            kind = {"tfds": tfds_corpus.TfdsCorpus, "demo": tfds_corpus.DemoCorpus}[spec.kind]
        corpora.append(kind(spec, data.source_language, data.target_language))
    return corpora


def corpora_with(corpora: Sequence[Corpus], split: str, field: str) -> list[Corpus]:
    """The corpora that have the split, which `field` of the config names. Raises InputError where none has."""
    found = [corpus for corpus in corpora if corpus.has_split(split)]
    if not found:
        raise InputError(
            f"no corpus has the split {split!r} ({'; '.join(corpus.lack(split) for corpus in corpora)}): "
            f"set {field} to one that there is, or add it"
        )
    return found
