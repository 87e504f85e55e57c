"""BLEU and chrF of a whole corpus, each with the signature that says how it was counted (Post, 2018)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score from 0 to 100."""

    value: float
    signature: str


# Where no blanks divide words, sacreBLEU's default would take a whole sentence for one. It has a tokenizer of Chinese;
# of the others, characters are what it counts without packages of its own.
_BLEU_TOKENS = {"zh": "zh"} | dict.fromkeys(("ja", "km", "lo", "my", "th"), "char")


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str], language: str = "en") -> dict[str, Score]:
    """{"bleu", "chrf"}: cased, over detokenised text, as sacreBLEU counts them by default.

    BLEU of Chinese (`language` is of the target: "zh", or "zh_CN") is of its tokens by sacreBLEU, that of other
    languages without blanks of characters; the signature says so.
    """
    from sacrebleu.metrics import BLEU, CHRF

    bleu = BLEU(tokenize=_BLEU_TOKENS.get(_without_region(language)))
    scores = {}
    for name, metric in (("bleu", bleu), ("chrf", CHRF())):
        value = metric.corpus_score(list(hypotheses), [list(references)]).score
        scores[name] = Score(value, metric.get_signature().format(short=False))
    return scores


def tokenised_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score | None:
    """BLEU of lower-cased text in Moses' tokens, which papers on small corpora report.

    None without sacremoses, and for languages without blanks, of which Moses would take a sentence for a token. Not to
    be compared with `corpus_scores`: it counts other tokens, and does not see case.
    """
    language = _without_region(language)
    if importlib.util.find_spec("sacremoses") is None or language in _BLEU_TOKENS:
        return None
    from sacrebleu.metrics import BLEU
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalise, tokenise = MosesPunctNormalizer(lang=language).normalize, MosesTokenizer(lang=language).tokenize

    def tokens(lines: Sequence[str]) -> list[str]:
        return [tokenise(normalise(line.lower()), return_str=True, escape=False) for line in lines]

    metric = BLEU(tokenize="none", lowercase=False, force=True)
    value = metric.corpus_score(tokens(hypotheses), [tokens(references)]).score
    return Score(value, f"lower-cased, sacremoses tokens of {language}|{metric.get_signature().format(short=False)}")


def _without_region(language: str) -> str:
    """`zh_CN` -> `zh`."""
    return re.split("[-_]", language.lower())[0]
