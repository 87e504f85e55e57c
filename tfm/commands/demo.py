"""Train on the embedded corpus, translate unseen sentences, and show how well it went."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from tfm.commands.options import parse
from tfm.commands.train import deterministic_where_asked, trained
from tfm.config import InputError

EXAMPLES_PER_CATEGORY = 2


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train on the embedded corpus of numbers, dates, times and amounts, and translate its test sentences."""

    workdir: str
    """Directory of the run; a demo that was interrupted goes on there."""
    config: str = "demo"
    """Name of a shipped config, or the path of a .py file with get_config()."""


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    arguments, config = parse("demo", argv, Arguments)
    if config.data.corpus != ("demo",):
        raise InputError(
            f"data.corpus={' '.join(config.data.corpus)}: tfm demo trains on its own corpus and shows how that went: "
            "leave it out, or use tfm train and tfm evaluate"
        )
    deterministic_where_asked(config)
    from tfm import backend
    from tfm.data import demo_corpus
    from tfm.decoding.bleu import corpus_scores
    from tfm.decoding.translator import Translator

    with demo_corpus.explained():  # before the training: a wrong name is said at once
        pairs = list(demo_corpus.data_source(config.data.test_split))
    try:
        sources = [pair[config.data.source_language] for pair in pairs]
        references = [pair[config.data.target_language] for pair in pairs]
    except KeyError as error:
        raise InputError(f"{error}: the demo's sentences are in en and de: leave data.*_language out") from error
    backend.use_compilation_cache()  # what validation has compiled translates the test set
    status = trained(config, arguments.workdir)
    if status:
        return status
    translator = Translator.load(arguments.workdir, config, scores=False)
    translating = time.perf_counter()
    hypotheses = [translation.text for translation in translator.translate(sources)]
    now = time.perf_counter()

    print(
        f"\nUnseen sentences, step {translator.steps[0]}: none of their numbers, dates, times and amounts occurs in "
        "training as a whole."
    )
    for category in demo_corpus.CATEGORIES:
        rows = [i for i, pair in enumerate(pairs) if pair["category"] == category]
        wrong = [i for i in rows if hypotheses[i] != references[i]]
        print(
            f"\n{category}: {len(rows) - len(wrong)} of {len(rows)} exact, error rate {_percent(len(wrong), len(rows))}"
        )
        _show([i for i in rows if i not in wrong][:EXAMPLES_PER_CATEGORY], sources, hypotheses)
        for i in wrong[:1]:
            _show([i], sources, hypotheses)
            print(f"    expected   {references[i]}")
    exact = sum(hypothesis == reference for hypothesis, reference in zip(hypotheses, references, strict=True))
    print(f"\nexact matches  {exact} of {len(pairs)}, {_percent(exact, len(pairs))}")
    for name, score in corpus_scores(hypotheses, references).items():
        print(f"{name:<14} {score.value:.2f}   {score.signature}")
    print(f"translated in  {now - translating:.1f} s, compiling included")
    print(f"in all         {now - started:.0f} s; the run is in {arguments.workdir}, curves in curves.png\n")
    print(f"Translate your own:  python -m tfm translate --workdir={arguments.workdir}")
    return 0


def _show(rows: Sequence[int], sources: Sequence[str], hypotheses: Sequence[str]) -> None:
    for i in rows:
        print(f"    {sources[i]}\n    -> {hypotheses[i]}")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
