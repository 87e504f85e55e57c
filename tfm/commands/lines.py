"""Files of lines: a line ends at a newline and nowhere else, and what is written is a whole number of them."""

from __future__ import annotations

import codecs
import fcntl
import gzip
import json
import os
import select
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from tfm.config import InputError
from tfm.files import GZIP, write_atomically
from tfm.text import finite

STANDARD_STREAM = Path("-")
"""How standard output, or input, is named where a file is expected."""

JSON_BEGINS = b'{"line": 1, "translations": '
"""How what `translate --format=jsonl` writes begins."""

_SECONDS_OF_SILENCE = 1.0  # between looks at a pipe that does not say when there is more


def opened(path: Path | None, stack: ExitStack) -> IO[bytes]:
    """A file to read, gzip unpacked, or standard input, unbuffered. Raises InputError naming what cannot be opened.

    A thread reads it, which may still wait for more when all else has ended: it must not hold a buffer's lock then.
    """
    if path is None or path == STANDARD_STREAM:
        if sys.stdin is None:
            raise InputError("standard input is closed: name a file to read")
        return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        if not file.seekable():
            return file
        is_packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        return stack.enter_context(gzip.GzipFile(str(path), "rb", fileobj=file)) if is_packed else file
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error


def refuse_shared_standard_input(**inputs: Path | None) -> None:
    """Raises InputError where several inputs are standard input, or where each of several hosts would read its own.

    Args:
      inputs: by the name of its option; `-` is standard input. One that isn't given is None, and left out.
    """
    from tfm import hosts

    names = [f"--{name}=-" for name, path in inputs.items() if path == STANDARD_STREAM]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)}: only one of them can be standard input: name a file")
    if names and hosts.count() > 1:
        raise InputError(f"{names[0]}: several hosts have one input, which all of them read: name a file")


def raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, each as soon as it is there, without the newline that ends them or a byte order mark.

    Raises InputError naming a file that cannot be read to its end.
    """
    for number, line in enumerate(_split(_blocks(file))):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) and name != "<stdin>" else "standard input"
    is_first = True
    try:
        while (block := file.read(1 << 16)) != b"":
            if block is None:  # nothing yet, in a pipe whose other end was made not to wait
                select.select([file], [], [], _SECONDS_OF_SILENCE)
                continue
            if is_first and block.startswith(GZIP):  # nobody looked before: what a pipe has given cannot be put back
                raise InputError(f"{name}: begins as a gzip file does: unpack it first, with zcat")
            is_first = False
            yield block
    except (OSError, EOFError, zlib.error) as error:  # the latter two of damaged gzip
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _split(blocks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for block in blocks:
        *lines, rest = block.split(b"\n")
        for line in lines:
            yield b"".join((*begun, line))
            begun.clear()
        begun.append(rest)
    if line := b"".join(begun):
        yield line


def text_lines(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as text; bytes that are not UTF-8 become U+FFFD."""
    for line in lines:
        yield line.decode("utf-8", errors="replace")


class Output:
    """Lines to a file, or to standard output; a write that fails or is interrupted leaves whole lines in the file.

    Args:
      path: of a file that doesn't exist yet, or of what is no file, such as a pipe or /dev/null; standard output when
        None or `-`.
      resume: the file may exist; lines are written behind its last newline, and what follows that is dropped then. None
        where a command cannot do that.

    Raises InputError, here and at `write`, naming what cannot be written.
    """

    def __init__(self, path: Path | None, resume: bool | None = None):
        self.lines = 0
        """Lines that the file has."""
        self.begins_with = b""
        """The first bytes of a file that is gone on with."""
        path = None if path == STANDARD_STREAM else path
        self._name = "standard output" if path is None else str(path)
        self._hint = "" if resume is None else ", or go on behind its lines with --resume"
        self._path = path
        self._whole: int | None = None  # bytes of whole lines; None where nothing can be taken back
        self._begun, self._is_new = False, False
        if path is None:
            if sys.stdout is None:
                raise InputError("standard output is closed: name a file to write with --output")
            self._file: IO[bytes] = sys.stdout.buffer
            return
        if path.is_dir():
            raise InputError(f"{path}: is a directory: name a file in it")
        try:
            if _is_special(path):
                self._file = path.open("ab", buffering=0)
                return
            self._is_new = not (resume and path.exists())
            self._file = path.open("x+b" if self._is_new else "r+b", buffering=0)
            self._lock(path)
            self._whole = 0
            if resume:
                self._count()
        except FileExistsError as error:
            raise InputError(f"{path}: exists already: remove it or name another --output{self._hint}") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def _lock(self, path: Path) -> None:
        """Keeps another process from going on behind lines of which this one will write more; it ends with the file."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(f"{path}: another process is writing it: wait for it to end, or name another") from error
        except OSError:  # a disk that knows no locks
            pass

    def _count(self) -> None:
        offset = 0
        while block := self._file.read(1 << 20):
            if b"\n" in block:
                self.lines += block.count(b"\n")
                self._whole = offset + block.rindex(b"\n") + 1
            self.begins_with = self.begins_with or block[:100]
            offset += len(block)

    def is_also(self, file: IO[bytes]) -> bool:
        """Whether an open file is the regular one that is written."""
        try:
            return self._whole is not None and os.path.samestat(os.fstat(self._file.fileno()), os.fstat(file.fileno()))
        except OSError:  # no file at all, but bytes in memory
            return False

    def _take_back(self) -> None:
        if self._whole is not None:
            self._file.truncate(self._whole)
            self._file.seek(self._whole)

    def write(self, lines: Sequence[str]) -> None:
        """Writes lines, at once."""
        if not self._begun:  # until then the file may turn out to be the wrong one, and is left as it is
            self._take_back()
            self._begun = True
        content = memoryview("".join(f"{line}\n" for line in lines).encode())
        size = len(content)
        try:
            while content:
                content = content[self._send(content) :]
            self._flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            self._take_back()
            kept = f"; its first {self.lines} lines are whole{self._hint}" if self._whole else ""
            raise InputError(f"{self._name}: cannot be written: {error.strerror}{kept}") from error
        except BaseException:  # Ctrl-C between two halves of a write
            self._take_back()
            raise
        self.lines += len(lines)
        if self._whole is not None:
            self._whole += size

    def _send(self, content: memoryview) -> int:
        """Writes what there is room for, and waits where there is none, in a pipe that was made not to wait itself."""
        try:
            sent = self._file.write(content) or 0
        except BlockingIOError as full:
            sent = full.characters_written
        if not sent:
            self._wait()
        return sent

    def _flush(self) -> None:
        while True:
            try:
                return self._file.flush()
            except BlockingIOError:
                self._wait()

    def _wait(self) -> None:
        select.select([], [self._file], [], _SECONDS_OF_SILENCE)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._path is not None:
            if kind is None and not self._begun:  # there was nothing left to do
                self._take_back()
            self._file.close()
            # An empty file would be in the way of the next attempt.
            if kind is not None and self._is_new and not self.lines:
                self._path.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """A pipe, a terminal or another device: written to as it is, and never made or removed."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path) -> None:
    """Raises InputError where a file cannot be written: before minutes of work, rather than after them."""
    if path == STANDARD_STREAM:
        if sys.stdout is None:
            raise InputError("standard output is closed: name a file to write")
        return
    try:
        if _is_special(path):  # whoever reads a pipe would take its closing for the end
            return
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:  # what fails later should not leave an empty file, also where a link leads to it
            path.resolve().unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def is_same_file(one: Path | None, other: Path | None) -> bool:
    """Whether two paths name one file, there or not, or both standard output."""
    if one is None or other is None or STANDARD_STREAM in (one, other):
        return one is not None and one == other
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def check_outputs(json_file: Path | None, picture: Path | None, what: str = "the picture") -> None:
    """Raises InputError where --json or --picture cannot be written, or both are one file; `what` is drawn there."""
    if picture == STANDARD_STREAM:
        raise InputError("--picture=-: a picture is not written to standard output: name a .png file")
    if is_same_file(picture, json_file):
        raise InputError(f"--json={json_file}: {what} would overwrite it: name another")
    for path in (json_file, picture):
        if path is not None:
            check_writable(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, or to standard output for `-`.

    Raises InputError naming what cannot be written.
    """
    try:
        if path == STANDARD_STREAM:
            sys.stdout.write(text)
        elif _is_special(path) or not os.access(path.resolve().parent, os.W_OK):
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path.resolve(), text.encode())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def json_line(value: Any) -> str:
    """JSON in which nothing can be taken for the end of a line, and what is no number is null."""
    text = json.dumps(finite(value), ensure_ascii=False)
    for character in "\u0085\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
