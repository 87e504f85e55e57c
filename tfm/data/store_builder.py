"""Builds a token store: two passes over each split, the first to check and to sample, the second to tokenize."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfm.config import Config, InputError
from tfm.data.checks import EMPTY, CorpusReport, SplitReport, TextChecks, check_lengths
from tfm.data.corpus import Corpus, RawPair, corpora_with, to_text
from tfm.data.shards import SIDES, TOKENIZER, StoreWriter
from tfm.data.tokenizer import EOS, SentenceSample, Tokenizer, train_tokenizer

_CHUNK = 20_000  # pairs read, checked and tokenized at a time
_PROGRESS = 5_000_000  # pairs between two lines of progress

log = logging.getLogger(__name__)


def build_store(
    config: Config, corpora: Sequence[Corpus], directory: Path, tokenizer: Tokenizer | None, fields: dict[str, Any]
) -> None:
    """Writes the whole store into the empty `directory`."""
    data = config.data
    parts = [(corpus, data.train_split) for corpus in corpora]
    parts += [(corpus, data.validation_split) for corpus in corpora_with(corpora, data.validation_split)]
    sample = SentenceSample(data.tokenizer_sample)
    scanned = [_scan(corpus, split, config, sample if split == data.train_split else None) for corpus, split in parts]
    tags = [corpus.spec.tag for corpus in corpora if corpus.spec.tag]
    asked = data.vocab_size
    if tokenizer is None:
        sentences = sample.sentences()
        log.info("training the tokenizer on %d sentences", len(sentences))
        tokenizer = train_tokenizer(sentences, directory / TOKENIZER, asked, tags, data.tokenizer_model)
    else:
        asked = tokenizer.vocab_size
    writer = StoreWriter(directory, tokenizer)
    for (corpus, _), (split_report, repeated) in zip(parts, scanned, strict=True):
        _tokenize(corpus, split_report, repeated, config, tokenizer, writer)
    report = CorpusReport([split_report for split_report, _ in scanned], asked, tokenizer.vocab_size)
    sources = [entry for corpus, split in parts for entry in corpus.identity(split)]
    writer.finish(fields=fields, sources=sources, report=report.to_dict())


def _chunks(pairs: Iterator[RawPair]) -> Iterator[list[RawPair]]:
    while chunk := list(itertools.islice(pairs, _CHUNK)):
        yield chunk


def _scan(
    corpus: Corpus, split: str, config: Config, sample: SentenceSample | None
) -> tuple[SplitReport, npt.NDArray[np.bool_] | None]:
    """First pass over a split: checks the text, and draws the tokenizer's sentences.

    Returns the report so far, and which pairs repeat an earlier one where those are to be dropped.
    """
    training = split == config.data.train_split
    report = SplitReport(corpus.name, split, corpus.where(split), training, config.data.drop_duplicates)
    checks = TextChecks(report)
    for chunk in _chunks(corpus.pairs(split)):
        texts = [(to_text(source), to_text(target)) for source, target in chunk]
        checks.add(chunk, texts)
        if sample is not None:
            sample.add(texts, corpus.spec.weight)
        if report.pairs % _PROGRESS == 0:
            log.info("%s %s: %d pairs checked", corpus.name, split, report.pairs)
    if not report.pairs:
        raise InputError(f"{corpus.where(split)}: no pairs in the split {split!r}; give a corpus with at least one")
    repeated = checks.finish()
    if training and report.findings[EMPTY].count == report.pairs:
        raise InputError(
            f"{report.origin}: each of the {report.pairs} pairs has an empty side; give a corpus with text"
        )
    return report, repeated if training and config.data.drop_duplicates else None


def _tokenize(
    corpus: Corpus,
    report: SplitReport,
    repeated: npt.NDArray[np.bool_] | None,
    config: Config,
    tokenizer: Tokenizer,
    writer: StoreWriter,
) -> None:
    """Second pass over a split: tokenizes on all cores, drops what training drops, and writes."""
    data = config.data
    writer.start_table(corpus.name, report.split, corpus.spec.weight)
    prefix = [tokenizer.tag_id(corpus.spec.tag)] if corpus.spec.tag else []
    texts: list[tuple[str, str]] = []
    line = 1
    for chunk in _chunks(corpus.pairs(report.split)):
        pairs = [(to_text(source), to_text(target)) for source, target in chunk]
        ids = {side: tokenizer.encode([pair[i] for pair in pairs]) for i, side in enumerate(SIDES)}
        extra = {"source": len(prefix) + 1, "target": 1}
        lengths = {side: np.fromiter(map(len, ids[side]), np.int32, len(pairs)) for side in SIDES}
        empty = (lengths["source"] == 0) | (lengths["target"] == 0)
        lengths = {side: lengths[side] + extra[side] for side in SIDES}
        keep = check_lengths(
            report,
            line,
            empty,
            lengths["source"],
            lengths["target"],
            (data.source_row_length, data.target_row_length),
            data.max_length_ratio,
        )
        if repeated is not None:
            keep &= ~repeated[line - 1 : line - 1 + len(pairs)]
        kept = np.flatnonzero(keep)
        flat = {
            "source": _flat([*prefix, *ids["source"][i], EOS] for i in kept),
            "target": _flat([*ids["target"][i], EOS] for i in kept),
        }
        writer.append(flat["source"], lengths["source"][keep], flat["target"], lengths["target"][keep])
        report.stored += len(kept)
        report.source_tokens += len(flat["source"])
        report.target_tokens += len(flat["target"])
        if not report.training:
            texts += pairs
        line += len(pairs)
        if (line - 1) % _PROGRESS == 0:
            log.info("%s %s: %d pairs tokenized", corpus.name, report.split, line - 1)
    if not report.stored:
        raise InputError(
            f"{report.origin}: every one of {report.pairs} pairs was dropped "
            f"({'; '.join(text.strip() for text in report.lines()[1:])}); mend the corpus, or raise "
            "data.source_row_length and data.target_row_length"
        )
    if texts:
        writer.add_text(texts)


def _flat(rows: Iterable[list[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32)
