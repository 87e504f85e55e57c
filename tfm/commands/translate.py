"""Translate lines: one line out for each line in, always."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tfm.commands.lines import (
    JSON_BEGINS,
    STANDARD_STREAM,
    Output,
    json_line,
    opened,
    raw_lines,
    refuse_shared_standard_input,
    text_lines,
)
from tfm.commands.options import parse
from tfm.commands.translating import Models, log_rate, translating
from tfm.config import InputError

if TYPE_CHECKING:
    from tfm.decoding.translation import Translation


@dataclasses.dataclass(frozen=True)
class Arguments(Models):
    """Translate each line of standard input, or of a file, to standard output, or to a file."""

    input: Path | None = None
    """File to translate, one sentence a line (.gz too), in place of standard input."""
    output: Path | None = None
    """File to write, which must not exist, in place of standard output."""
    resume: bool = False
    """Go on behind the lines that --output already has: an interrupted translation, with the same input."""
    format: Literal["text", "jsonl"] = "text"
    """The best translation of each line, or a JSON object a line with all decoding.n_best, their scores and tokens."""
    prefixes: Path | None = None
    """File with the text that each translation has to begin with, one a line; an empty line leaves it free. Blanks at
    its ends count for nothing, so that its last word may be continued."""


def main(argv: list[str]) -> int:
    arguments, config = parse("translate", argv, Arguments)
    for name in ("input", "output"):
        if getattr(arguments, name) == STANDARD_STREAM:
            arguments = dataclasses.replace(arguments, **{name: None})
    if arguments.resume and arguments.output is None:
        raise InputError("--resume goes on behind the lines of --output: name that file")
    from tfm import hosts

    with translating(config), ExitStack() as stack:
        refuse_shared_standard_input(input=arguments.input or STANDARD_STREAM, prefixes=arguments.prefixes)
        file = opened(arguments.input, stack)
        source = raw_lines(file)
        forced = None if arguments.prefixes is None else opened(arguments.prefixes, stack)
        prefixes = None if forced is None else raw_lines(forced)
        target = stack.enter_context(Output(arguments.output, arguments.resume)) if hosts.is_first() else None
        if target is not None and arguments.resume:
            for name, its in (("--input", file), ("--prefixes", forced)):
                if its is not None and target.is_also(its):
                    raise InputError(f"{arguments.output}: is {name} as well: name another --output")
            _refuse_other_format(arguments, target)
        done = hosts.agreed(0 if target is None else target.lines)
        for lines in (source, prefixes):
            if lines is not None and sum(1 for _ in islice(lines, done)) < done:
                raise InputError(f"{arguments.output}: has {done} lines, more than there are to translate")
        from tfm.decoding.translator import Translator

        if file.isatty():  # someone types and waits: one sentence at a time, in a shape that has room for it alone
            decoding = dataclasses.replace(config.decoding, sentences_per_batch=1)
            config = dataclasses.replace(config, decoding=decoding)
        translator = Translator.load(
            arguments.workdir, config, arguments.checkpoint, arguments.ensemble, scores=arguments.format != "text"
        )
        start = time.perf_counter()
        given = None if prefixes is None else text_lines(prefixes)
        for window in translator.windows(text_lines(source), given, first=done + 1):
            if target is None:
                continue
            if arguments.format == "text":
                target.write([translation.text for translation in window])
            else:
                first = target.lines + 1
                target.write([_as_json(first + index, translation) for index, translation in enumerate(window)])
        if target is not None:
            log_rate(translator, time.perf_counter() - start)
    return 0


def _refuse_other_format(arguments: Arguments, target: Output) -> None:
    """Raises InputError where what is to be gone on with is not what this command writes."""
    is_json = target.begins_with.startswith(JSON_BEGINS)
    if target.lines and is_json != (arguments.format == "jsonl"):
        found = "jsonl" if is_json else "text"
        raise InputError(
            f"{arguments.output}: was written with --format={found}: go on with that, or name another file"
        )


def _as_json(line: int, translation: Translation) -> str:
    hypotheses = [
        {"text": one.text, "score": one.score, "log_prob": one.log_prob, "tokens": one.tokens}
        for one in translation.hypotheses
    ]
    return json_line({"line": line, "translations": hypotheses})
