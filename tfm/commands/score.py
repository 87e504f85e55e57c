"""Score given translations: the log-probability that the model gives each line, and its tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from tfm.commands.lines import (
    JSON_BEGINS,
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


@dataclasses.dataclass(frozen=True)
class Arguments(Models):
    """Write the log-probability (natural logarithm) of each line of --target as a translation of that of --source."""

    source: Path
    """File of source sentences, one a line (.gz too)."""
    target: Path
    """File with a translation of each; one that ends in .jsonl, or begins as `translate --format=jsonl` does, is of
    that, and the very tokens of its best translations are scored."""
    output: Path | None = None
    """File to write, which must not exist, in place of standard output."""
    format: Literal["text", "jsonl"] = "text"
    """One number a line, or a JSON object a line with log_prob, the length-penalised score, tokens and their share."""


def main(argv: list[str]) -> int:
    arguments, config = parse("score", argv, Arguments)
    from tfm import hosts

    with translating(config, scoring=True), ExitStack() as stack:
        refuse_shared_standard_input(source=arguments.source, target=arguments.target)
        files = [opened(path, stack) for path in (arguments.source, arguments.target)]
        if all(file.seekable() for file in files):
            starts = [file.tell() for file in files]  # of standard input, something may have been read before
            counts = [sum(1 for _ in raw_lines(file)) for file in files]
            if counts[0] != counts[1]:
                raise InputError(
                    f"{arguments.source} has {counts[0]} lines and {arguments.target} has {counts[1]}: they must have "
                    "the same number"
                )
            for file, start in zip(files, starts, strict=True):
                file.seek(start)
        output = stack.enter_context(Output(arguments.output)) if hosts.is_first() else None
        from tfm.decoding.translator import Translator

        translator = Translator.load(arguments.workdir, config, arguments.checkpoint, arguments.ensemble)
        start = time.perf_counter()
        sources, targets = map(raw_lines, files)
        beginning = list(itertools.islice(targets, 1))
        targets = itertools.chain(beginning, targets)
        named = arguments.target.name.removesuffix(".gz").endswith(".jsonl")
        is_json = named or any(line.startswith(JSON_BEGINS) for line in beginning)  # a pipe has no name
        given = _best_tokens(targets, arguments.target) if is_json else text_lines(targets)
        for window in translator.score_windows(text_lines(sources), given):
            if output is None:
                continue
            if arguments.format == "text":
                output.write([f"{scored.log_prob:.6f}" for scored in window])
            else:
                first = output.lines + 1
                output.write(
                    [json_line({"line": first + i, **dataclasses.asdict(scored)}) for i, scored in enumerate(window)]
                )
        if output is not None:
            log_rate(translator, time.perf_counter() - start)
    return 0


def _best_tokens(lines: Iterable[bytes], path: Path) -> Iterator[Sequence[str]]:
    """The tokens of the best translation of each line."""
    for number, line in enumerate(lines, 1):
        try:
            tokens = json.loads(line)["translations"][0]["tokens"]
            if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
                raise TypeError("tokens is no list of texts")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: not a line of `translate --format=jsonl` ({type(error).__name__}: {error})"
            ) from error
        yield tokens
