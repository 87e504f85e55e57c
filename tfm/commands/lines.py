"""Files of lines: a line ends at a newline and nowhere else, and what is written is a whole number of them."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tfm.config import InputError

if TYPE_CHECKING:
    from tfm.decoding.translator import Translator

_log = logging.getLogger(__name__)


def opened(path: Path | None, stack: ExitStack) -> IO[bytes]:
    """A file to read, or standard input. Raises InputError naming the file that cannot be opened."""
    if path is None:
        return sys.stdin.buffer
    try:
        return stack.enter_context(path.open("rb"))
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error


def text_lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a file; bytes that are not UTF-8 become U+FFFD."""
    for line in file:
        yield line.removesuffix(b"\n").decode("utf-8", errors="replace")


class Output:
    """Lines to a file, or to standard output; of a file no more than whole lines are left, whatever happens.

    Args:
      path: of a file that doesn't exist yet; standard output when None.
      resume: the file may exist; what follows its last newline is dropped, and lines are written behind it.

    Raises InputError, here and at `write`, naming what cannot be written.
    """

    def __init__(self, path: Path | None, resume: bool = False):
        self.lines = 0
        """Lines that the file has."""
        self._name = "standard output" if path is None else str(path)
        self._file: IO[bytes] = sys.stdout.buffer
        self._whole: int | None = None  # bytes of whole lines; None where nothing can be taken back
        if path is None:
            return
        try:
            self._file = path.open("r+b" if resume and path.exists() else "x+b", buffering=0)
            self._whole = 0
            if resume:
                self._count()
        except FileExistsError as error:
            raise InputError(
                f"{path}: exists already: remove it, name another --output, or go on behind its lines with --resume"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def _count(self) -> None:
        offset = 0
        while block := self._file.read(1 << 20):
            if b"\n" in block:
                self.lines += block.count(b"\n")
                self._whole = offset + block.rindex(b"\n") + 1
            offset += len(block)
        self._take_back()

    def _take_back(self) -> None:
        if self._whole is not None:
            self._file.truncate(self._whole)
            self._file.seek(self._whole)

    def write(self, lines: Sequence[str]) -> None:
        """Writes lines, at once."""
        content = memoryview("".join(f"{line}\n" for line in lines).encode())
        size = len(content)
        try:
            while content:
                content = content[self._file.write(content) or 0 :]
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            self._take_back()
            kept = f"; its first {self.lines} lines are whole, and --resume goes on behind them" if self._whole else ""
            raise InputError(f"{self._name}: cannot be written: {error.strerror}{kept}") from error
        except BaseException:  # Ctrl-C between two halves of a write
            self._take_back()
            raise
        self.lines += len(lines)
        if self._whole is not None:
            self._whole += size

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self._whole is not None:
            self._file.close()


def json_line(value: Any) -> str:
    """JSON in which nothing can be taken for the end of a line, and what is no number is null."""
    text = json.dumps(_finite(value), ensure_ascii=False)
    for character in "\u0085\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(its) for its in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log_rate(translator: Translator, seconds: float) -> None:
    """What was done, how fast, and with how many compiled shapes."""
    done, compiled = translator.statistics, translator.decoder.compile_seconds
    seconds = max(seconds, 1e-9)
    _log.info(
        "%s lines in %.1f s: %.1f lines/s, %.0f source and %.0f target tokens/s, %.1f %% of the source side padding, "
        "%.1f %% of the sentences decoded twice; %d shapes compiled in %.1f s",
        *(f"{done.lines:,}", seconds, done.lines / seconds, done.source_tokens / seconds),
        *(
            done.target_tokens / seconds,
            100 * done.padding,
            100 * done.again / max(done.sentences, 1),
            len(compiled),
            sum(compiled.values()),
        ),
    )
