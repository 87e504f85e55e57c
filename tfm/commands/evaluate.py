"""Score translations: BLEU and chrF, with the signatures that say how they were counted."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tfm.commands.lines import STANDARD_STREAM, Output, check_writable, is_same_file, write_text
from tfm.commands.options import parse
from tfm.commands.translating import Models, log_rate, translating
from tfm.config import Config, InputError


@dataclasses.dataclass(frozen=True)
class Arguments(Models):
    """Translate a test set and score the translations against its references."""

    source: Path | None = None
    """File to translate, one sentence a line (.gz too); the run's data.test_split if unset."""
    reference: Path | None = None
    """File with the reference of each line of --source."""
    json: Path | None = None
    """File for the scores as JSON, overwritten; - is standard output."""
    output: Path | None = None
    """File for the translations, one a line, which must not exist; - is standard output."""


def main(argv: list[str]) -> int:
    arguments, config = parse("evaluate", argv, Arguments)
    with translating(config), ExitStack() as stack:
        _evaluate(arguments, config, stack)
    return 0


def _evaluate(arguments: Arguments, config: Config, stack: ExitStack) -> None:
    """Translates and scores; `stack` closes what is opened to write."""
    from tfm import hosts
    from tfm.decoding.bleu import corpus_scores, tokenised_bleu
    from tfm.decoding.translator import Translator

    sources, references = _pairs(arguments, config)
    output = None
    if hosts.is_first():
        if arguments.json is not None:
            for name in ("output", "source", "reference"):
                if is_same_file(arguments.json, getattr(arguments, name)):
                    raise InputError(f"--json={arguments.json}: would overwrite --{name}: name another")
            check_writable(arguments.json)
        if arguments.output is not None:
            output = stack.enter_context(Output(arguments.output))
    translator = Translator.load(arguments.workdir, config, arguments.checkpoint, arguments.ensemble, scores=False)
    start = time.perf_counter()
    hypotheses = [translation.text for translation in translator.translate(sources)]
    seconds = time.perf_counter() - start
    if not hosts.is_first():
        return
    scores = corpus_scores(hypotheses, references, config.data.target_language)
    if (tokenised := tokenised_bleu(hypotheses, references, config.data.target_language)) is not None:
        scores["bleu_lowercased_tokenised"] = tokenised
    log_rate(translator, seconds)
    report = json.dumps(
        {
            "sentences": len(sources),
            "steps": list(translator.steps),
            "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        },
        indent=2,
    )
    if arguments.json != STANDARD_STREAM:
        where = sys.stderr if arguments.output == STANDARD_STREAM else sys.stdout
        for name, score in scores.items():
            print(f"{name:<26} {score.value:6.2f}   {score.signature}", file=where, flush=True)
    # Once the scores are told: a disk may be full. What took longest comes first, and neither waits for the other.
    try:
        if output is not None:
            output.write(hypotheses)
    finally:
        if arguments.json is not None:
            write_text(arguments.json, report + "\n")


def _pairs(arguments: Arguments, config: Config) -> tuple[list[str], list[str]]:
    """Source and reference lines. Raises InputError where there are none, or not as many of each."""
    from etils import epath

    from tfm.data.corpus import corpora_with, open_corpora, parallel_lines, to_text

    if (arguments.source is None) != (arguments.reference is None):
        missing = "--reference" if arguments.reference is None else "--source"
        raise InputError(f"{missing} is missing: --source and --reference go together")
    if arguments.source is not None and arguments.reference is not None:
        raw = list(parallel_lines(epath.Path(arguments.source), epath.Path(arguments.reference)))
        where = str(arguments.source)
    else:
        where = f"data.test_split={config.data.test_split}"
        corpora = corpora_with(open_corpora(config.data), config.data.test_split, "data.test_split")
        raw = [
            (f"{corpus.spec.tag} ".encode() + source if corpus.spec.tag else source, target)
            for corpus in corpora
            for source, target in corpus.pairs(config.data.test_split)
        ]
    if not raw:
        raise InputError(
            f"{where}: no sentence to score; name another with --source and --reference or data.test_split"
        )
    return [to_text(source) for source, _ in raw], [to_text(target) for _, target in raw]
