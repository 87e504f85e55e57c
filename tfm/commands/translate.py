"""Translate lines: one line out for each line in, always."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from tfm.commands.options import parse
from tfm.config import InputError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Translate each line of standard input, or of a file, to standard output, or to a file."""

    workdir: Path
    """Directory of the run."""
    input: Path | None = None
    """File to translate, one sentence a line, in place of standard input."""
    output: Path | None = None
    """File to write, which must not exist, in place of standard output."""
    checkpoint: str | None = None
    """Which parameters: a step, last, best, or the mean last:N or best:N; decoding.average, or the best, if unset."""


def main(argv: list[str]) -> int:
    arguments, config = parse("translate", argv, Arguments)
    with ExitStack() as stack:
        source, target = _opened(arguments, stack)
        from tfm.decoding.translator import Translator

        translator = Translator.load(arguments.workdir, config, arguments.checkpoint)
        start, lines = time.perf_counter(), 0
        # Someone who types wants each answer at once; only a file is worth sorting into full batches.
        window = 1 if source.isatty() else None
        for translation in translator.stream(_lines(source), window):
            target.write(translation.text.encode() + b"\n")
            lines += 1
            if window == 1:
                target.flush()
        target.flush()
    seconds = time.perf_counter() - start
    shapes = translator.decoder.compile_seconds
    _log.info(
        "%d lines in %.1f s, %.1f lines/s; %d shapes compiled in %.1f s",
        *(lines, seconds, lines / max(seconds, 1e-9), len(shapes), sum(shapes.values())),
    )
    return 0


def _opened(arguments: Arguments, stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Input and output, before anything is loaded. Raises InputError naming the file that cannot be opened."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    try:
        if arguments.input is not None:
            source = stack.enter_context(arguments.input.open("rb"))
        if arguments.output is not None:
            target = stack.enter_context(arguments.output.open("xb"))
    except FileExistsError as error:
        raise InputError(f"{arguments.output}: exists already: remove it or name another --output") from error
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be opened: {error.strerror}") from error
    return source, target


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Lines end at a newline and nowhere else; bytes that are not UTF-8 become U+FFFD."""
    for line in file:
        yield line.removesuffix(b"\n").decode("utf-8", errors="replace")
