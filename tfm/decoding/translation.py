"""What a translator gives: translations of lines, scores of given ones, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hypothesis:
    """One translation of a line."""

    text: str
    tokens: tuple[str, ...]
    """The pieces that the text is made of, as the tokenizer spells them, without the end symbol."""
    log_prob: float
    """Log-probability of the tokens and the end symbol, in nats; of all parts together where the line was cut.
    0 where greedy search was not asked for scores."""
    score: float
    """log_prob by the length penalty: what a beam search is for."""


@dataclass(frozen=True)
class Translation:
    """The translations of one line, the best first; there is at least one."""

    hypotheses: tuple[Hypothesis, ...]

    @property
    def text(self) -> str:
        return self.hypotheses[0].text

    @property
    def log_prob(self) -> float:
        return self.hypotheses[0].log_prob

    @property
    def score(self) -> float:
        return self.hypotheses[0].score


@dataclass(frozen=True)
class Scored:
    """A given translation with its log-probability, in nats: of each token, the end symbol last, and of all together.

    NaN and no tokens where it, or its source, is longer than the model takes.
    """

    tokens: tuple[str, ...]
    token_log_probs: tuple[float, ...]
    log_prob: float
    score: float


@dataclass
class Statistics:
    """What was translated or scored so far."""

    lines: int = 0
    sentences: int = 0  # a line that was cut is several
    again: int = 0  # of these, decoded a second time, since they went on for longer than usual
    source_tokens: int = 0
    padded_tokens: int = 0  # source tokens, with the padding of the compiled shapes
    target_tokens: int = 0

    @property
    def padding(self) -> float:
        """Share of the source tokens that only fill shapes."""
        return 1 - self.source_tokens / max(self.padded_tokens, 1)


def length_penalty(length: Any, alpha: float) -> Any:
    """((5 + length) / 6) ** alpha, the divisor of a log-probability: Wu et al. (2016), equation 14; the end counts.

    Of a number, or of an array of floats, in whose precision it is computed.
    """
    return ((5.0 + length) / 6.0) ** alpha


def penalised(log_prob: float, tokens: int, alpha: float) -> float:
    """What a beam search is for, of a translation of so many tokens and its end."""
    return log_prob / length_penalty(tokens + 1, alpha)
