"""Builds a token store: two passes over each split, the first to check and to sample, the second to tokenize."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tfm.config import Config, DataConfig, InputError
from tfm.data.checks import EMPTY, NUL, CorpusReport, SplitReport, TextChecks, check_lengths
from tfm.data.corpus import Corpus, RawPair, corpora_with, file_stamp, to_text
from tfm.data.shards import TOKENIZER, StoreWriter
from tfm.data.tokenizer import EOS, SentenceSample, Tokenizer, train_tokenizer

_CHUNK = 20_000  # pairs read, checked and tokenized at a time
_PROGRESS = 5_000_000  # pairs between two lines of progress

_log = logging.getLogger(__name__)


def build_store(
    config: Config, corpora: Sequence[Corpus], directory: Path, tokenizer: Tokenizer | None, fields: dict[str, Any]
) -> None:
    """Writes the whole store into the empty `directory`."""
    data = config.data
    parts = [(corpus, data.train_split) for corpus in corpora]
    validating = corpora_with(corpora, data.validation_split, "data.validation_split")
    parts += [(corpus, data.validation_split) for corpus in validating]
    tags = [corpus.spec.tag for corpus in corpora if corpus.spec.tag]
    for corpus, split in parts:
        corpus.check(split)
    for tag in tags if tokenizer is not None else ():
        tokenizer.tag_id(tag)
    stamps = _stamps(parts)
    sample = SentenceSample(data.tokenizer_sample)
    scanned = [_scan(corpus, split, config, sample if split == data.train_split else None) for corpus, split in parts]
    asked = data.vocab_size
    if tokenizer is None:
        sentences = sample.sentences()
        _log.info("training the tokenizer on %d sentences", len(sentences))
        tokenizer = train_tokenizer(sentences, directory / TOKENIZER, asked, tags, data.tokenizer_model)
    else:
        asked = tokenizer.vocab_size
    writer = StoreWriter(directory, tokenizer)
    for (corpus, _), (split_report, repeated) in zip(parts, scanned, strict=True):
        _tokenize(corpus, split_report, repeated, config, tokenizer, writer)
    report = CorpusReport([split_report for split_report, _ in scanned], asked, tokenizer.vocab_size)
    for path, stamp in _stamps(parts).items():
        if stamp != stamps[path]:
            raise InputError(f"{path}: has changed while it was read: prepare it once it is complete")
    sources = [entry for corpus, split in parts for entry in corpus.identity(split)]
    writer.finish(fields=fields, sources=sources, report=report.to_dict())


def _stamps(parts: Sequence[tuple[Corpus, str]]) -> dict[epath.Path, dict[str, Any]]:
    return {path: file_stamp(path) for corpus, split in parts for path in corpus.paths(split) if path.exists()}


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
            _log.info("%s %s: %d pairs checked", corpus.name, split, report.pairs)
    if not report.pairs:
        raise InputError(f"{corpus.where(split)}: no pairs in the split {split!r}; give a corpus with at least one")
    if 2 * report.findings[NUL].count > report.pairs:
        raise InputError(
            f"{report.origin}: {report.findings[NUL].count} of {report.pairs} pairs hold NUL, so that this is no UTF-8 "
            "text: of UTF-16, `iconv -f utf-16 -t utf-8` makes it"
        )
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
    prefixes: tuple[list[int], list[int]] = ([tokenizer.tag_id(corpus.spec.tag)] if corpus.spec.tag else [], [])
    limits = (data.source_row_length, data.target_row_length)
    texts: list[tuple[str, str]] = []
    line = 1
    for chunk in _chunks(corpus.pairs(report.split)):
        if line - 1 + len(chunk) > report.pairs:
            raise _changed(corpus, report)
        pairs = [(to_text(source), to_text(target)) for source, target in chunk]
        ids = [tokenizer.encode(side) for side in zip(*pairs, strict=True)]
        empty = np.array([not (source and target) for source, target in zip(*ids, strict=True)])
        rows = [_framed(prefix, side) for prefix, side in zip(prefixes, ids, strict=True)]
        keep = check_lengths(report, line, empty, *map(_lengths, rows), limits, data.max_length_ratio)
        if repeated is not None:
            keep &= ~repeated[line - 1 : line - 1 + len(pairs)]
        kept = np.flatnonzero(keep)
        source, target = ([side[i] for i in kept] for side in rows)
        writer.append(_flat(source), _lengths(source), _flat(target), _lengths(target))
        report.stored += len(kept)
        report.source_tokens += sum(map(len, source))
        report.target_tokens += sum(map(len, target))
        if report.training and data.segmentations > 1 and len(kept):
            sentences = zip(*(pairs[i] for i in kept), strict=True)
            sides = zip(sentences, (source, target), prefixes, limits, strict=True)
            drawn = [_drawn(tokenizer, data, *side, seed=line) for side in sides]
            for source, target in zip(*drawn, strict=True):
                writer.append(_flat(source), _lengths(source), _flat(target), _lengths(target))
        if not report.training:
            tag = f"{corpus.spec.tag} " if corpus.spec.tag else ""  # as the tokens have it
            texts += [(tag + source, target) for source, target in pairs]
        line += len(pairs)
        if (line - 1) % _PROGRESS == 0:
            _log.info("%s %s: %d pairs tokenized", corpus.name, report.split, line - 1)
    if line - 1 != report.pairs:
        raise _changed(corpus, report)
    if not report.stored:
        raise InputError(
            f"{report.origin}: every one of {report.pairs} pairs was dropped "
            f"({'; '.join(text.strip() for text in report.lines()[1:])}); mend the corpus, or raise "
            "data.source_row_length and data.target_row_length"
        )
    if texts:
        writer.add_text(texts)


def _changed(corpus: Corpus, report: SplitReport) -> InputError:
    return InputError(
        f"{corpus.where(report.split)}: has changed while it was read, from {report.pairs} pairs at first: prepare it "
        "once it is complete"
    )


def _drawn(
    tokenizer: Tokenizer,
    data: DataConfig,
    sentences: Sequence[str],
    best: Sequence[list[int]],
    prefix: list[int],
    limit: int,
    seed: int,
) -> list[list[list[int]]]:
    """The random segmentations of one side; the best one stands in for one that is too long for a row."""
    versions = tokenizer.sample(sentences, data.segmentations - 1, data.segmentation_alpha, seed)
    return [
        [row if len(row) <= limit else fallback for row, fallback in zip(_framed(prefix, rows), best, strict=True)]
        for rows in versions
    ]


def _framed(prefix: list[int], rows: Sequence[list[int]]) -> list[list[int]]:
    return [[*prefix, *row, EOS] for row in rows]


def _lengths(rows: Sequence[list[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter(map(len, rows), np.int32, len(rows))


def _flat(rows: Iterable[list[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32)
