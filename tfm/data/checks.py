"""What `prepare` finds wrong with a corpus: counts, the first line numbers, and what becomes of those pairs.

Checks of the text run before the tokenizer is trained; those that count tokens, while the pairs are tokenized.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from tfm.data.corpus import RawPair

FIRST_LINES = 5
_EXTRA_TOKENS = 5  # added to both lengths before their ratio is taken, so that short pairs may differ more

EMPTY, UTF8, NUL = "empty side", "bytes that are not UTF-8", "NUL characters"
DUPLICATE, LONG, RATIO = "exact repetition of an earlier pair", "longer than a row", "wild length ratio"
KINDS = (EMPTY, UTF8, NUL, DUPLICATE, LONG, RATIO)


@dataclasses.dataclass
class Finding:
    """One kind of defect in one split: how often, where first (lines count from 1), and what is done about it."""

    kind: str
    action: str
    count: int = 0
    first_lines: list[int] = dataclasses.field(default_factory=list)

    def add(self, lines: npt.NDArray[np.integer]) -> None:
        """Counts the pairs on these lines, which must follow those added before."""
        self.count += len(lines)
        self.first_lines += [int(line) for line in lines[: FIRST_LINES - len(self.first_lines)]]


@dataclasses.dataclass
class SplitReport:
    """What was found in one split of one corpus, and how many pairs were kept."""

    corpus: str
    split: str
    origin: str
    training: bool
    drop_duplicates: bool
    pairs: int = 0
    stored: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    findings: dict[str, Finding] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.findings:
            self.findings = {kind: Finding(kind, self.action(kind)) for kind in KINDS}

    def action(self, kind: str) -> str:
        """What becomes of a pair with this defect: training drops what teaches nothing, other splits drop nothing."""
        if kind == UTF8:
            return "kept, each as U+FFFD"
        if kind == NUL:
            return "kept without them"
        if kind == DUPLICATE:
            return "dropped" if self.training and self.drop_duplicates else "kept"
        return "dropped" if self.training else "kept"

    def drops(self, kind: str) -> bool:
        return self.action(kind) == "dropped"

    def lines(self) -> list[str]:
        """The report as lines for a reader."""
        dropped = self.pairs - self.stored
        out = [
            f"{self.corpus} {self.split} ({self.origin}): {self.pairs} pairs, {dropped} dropped, {self.stored} stored "
            f"with {self.source_tokens} source and {self.target_tokens} target tokens"
        ]
        for finding in self.findings.values():
            if finding.count:
                first = ", ".join(map(str, finding.first_lines))
                more = ", …" if finding.count > len(finding.first_lines) else ""
                out.append(f"  {finding.kind}: {finding.count} pairs (line {first}{more}): {finding.action}")
        return out


@dataclasses.dataclass
class CorpusReport:
    """What `prepare` found and did; it stands in the store's manifest too."""

    splits: list[SplitReport]
    vocab_asked: int
    vocab_used: int

    def __str__(self) -> str:
        lowered = f", lowered from {self.vocab_asked}" if self.vocab_used < self.vocab_asked else ""
        return "\n".join(
            [line for split in self.splits for line in split.lines()]
            + [f"tokenizer: {self.vocab_used} pieces{lowered}"]
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CorpusReport:
        """The inverse of `to_dict`."""
        splits = [
            SplitReport(**{**split, "findings": {k: Finding(**f) for k, f in split["findings"].items()}})
            for split in values["splits"]
        ]
        return cls(**{**values, "splits": splits})


class TextChecks:
    """Checks of the text of one split, a chunk of pairs at a time; 8 bytes a pair are kept to find repetitions."""

    def __init__(self, report: SplitReport):
        self.report = report
        self._hashes: list[npt.NDArray[np.uint64]] = []

    def add(self, pairs: list[RawPair], texts: list[tuple[str, str]]) -> None:
        """Looks at the next pairs of the split, as they were read and as `to_text` makes text of them."""
        found: dict[str, list[int]] = {EMPTY: [], UTF8: [], NUL: []}
        digests = bytearray()
        for line, (source, target), text in zip(itertools.count(self.report.pairs + 1), pairs, texts, strict=False):
            both = source + b"\n" + target
            if not all(text):
                found[EMPTY].append(line)
            if b"\0" in both:
                found[NUL].append(line)
            if not both.isascii() and not _is_utf8(both):
                found[UTF8].append(line)
            digests += hashlib.blake2b(both, digest_size=8).digest()
        for kind, lines in found.items():
            self.report.findings[kind].add(np.array(lines, np.int64))
        self._hashes.append(np.frombuffer(bytes(digests), np.uint64))
        self.report.pairs += len(pairs)

    def finish(self) -> npt.NDArray[np.bool_]:
        """Whether each pair repeats an earlier one, bool [pairs]; call it once, after the last pair."""
        hashes = np.concatenate(self._hashes) if self._hashes else np.zeros(0, np.uint64)
        self._hashes = []
        repeated = np.zeros(len(hashes), bool)
        for part in range(16):  # a sixteenth at a time, so that sorting takes little memory beside the hashes
            index = np.flatnonzero(hashes >> np.uint64(60) == part)
            order = index[np.argsort(hashes[index], kind="stable")]
            repeated[order[1:][hashes[order[1:]] == hashes[order[:-1]]]] = True
        self.report.findings[DUPLICATE].add(np.flatnonzero(repeated) + 1)
        return repeated


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def check_lengths(
    report: SplitReport,
    first_line: int,
    empty: npt.NDArray[np.bool_],
    source_lengths: npt.NDArray[np.integer],
    target_lengths: npt.NDArray[np.integer],
    row_lengths: tuple[int, int],
    max_ratio: float,
) -> npt.NDArray[np.bool_]:
    """Which pairs of a chunk stay, bool [pairs], by their lengths in tokens; adds to the report.

    Lengths count EOS and the tag, `row_lengths` are those of source and target; `empty` says where a side is empty.
    """
    long = (source_lengths > row_lengths[0]) | (target_lengths > row_lengths[1])
    source, target = source_lengths + _EXTRA_TOKENS, target_lengths + _EXTRA_TOKENS
    ratio = np.maximum(source, target) > max_ratio * np.minimum(source, target)
    keep = np.ones(len(empty), bool)
    for kind, hits in ((EMPTY, empty), (LONG, long & ~empty), (RATIO, ratio & ~long & ~empty)):
        if kind != EMPTY:  # those were counted in the text
            report.findings[kind].add(np.flatnonzero(hits) + first_line)
        if report.drops(kind):
            keep &= ~hits
    return keep
