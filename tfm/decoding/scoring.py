"""The scores of given translations, in windows of a stream, batched and compiled as translating is."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np

from tfm import sharding
from tfm.allocator import give_back_freed_memory
from tfm.config import InputError
from tfm.data.tokenizer import EOS, Tokenizer
from tfm.decoding.decoder import Bucket, Decoder, bucket_of
from tfm.decoding.inputs import checked, in_step, several
from tfm.decoding.translation import Scored, Statistics, penalised
from tfm.decoding.windows import Windows, patience, window_lines

_log = logging.getLogger(__name__)


def score_windows(
    decoder: Decoder,
    tokenizer: Tokenizer,
    statistics: Statistics,
    sources: Iterable[str],
    targets: Iterable[str | Sequence[str]],
) -> Iterator[list[Scored]]:
    """As `Translator.score`, for streams of any length; `statistics` counts what was done."""
    sources = checked(several(sources, "sources"), "source")
    targets = checked(several(targets, "targets"), "target", kinds=str | Sequence)
    lines = window_lines(decoder.score_buckets[0].rows)
    with closing(Windows(in_step(sources, targets, "targets", 1), lines, patience())) as windows:
        first = 1
        while not windows.ended:
            window = windows.take(wait=True)
            yield _scored(decoder, tokenizer, statistics, window, first)
            first += len(window)
            if len(window) == lines:
                give_back_freed_memory()


def _scored(
    decoder: Decoder,
    tokenizer: Tokenizer,
    statistics: Statistics,
    window: Sequence[tuple[str, str | Sequence[str]]],
    first: int,
) -> list[Scored]:
    """The scores of one window, whose first line has the number `first`."""
    sources = [[*ids, EOS] for ids in tokenizer.encode([source for source, _ in window])]
    texts = iter(tokenizer.encode([target for _, target in window if isinstance(target, str)]))
    targets = []
    for number, (_, target) in enumerate(window, first):
        try:
            targets.append([*(next(texts) if isinstance(target, str) else tokenizer.ids(target)), EOS])
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error
    scored = [Scored((), (), 0.0, 0.0)] * len(window)
    buckets: dict[Bucket, list[int]] = defaultdict(list)
    longest = decoder.score_buckets[-1].length
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if (size := max(len(source), len(target))) > longest:
            scored[index] = Scored((), (), math.nan, math.nan)
            _log.warning(
                "line %d has %d tokens on one side, more than %d, and gets no score: raise decoding.max_source_length",
                *(first + index, size, longest),
            )
        elif size > 1:
            buckets[bucket_of(decoder.score_buckets, size)].append(index)
    started = []
    for bucket, members in sorted(buckets.items()):
        for at in range(0, len(members), bucket.rows):
            batch = members[at : at + bucket.rows]
            log_probs = decoder.score(bucket, [sources[i] for i in batch], [targets[i] for i in batch])
            started.append((batch, log_probs))
            statistics.padded_tokens += bucket.rows * bucket.length
    for batch, log_probs in started:
        log_probs_BT = sharding.on_host(log_probs)
        for row, index in enumerate(batch):
            length = len(targets[index])
            values = log_probs_BT[row, :length]
            total = float(np.sum(values, dtype=np.float32))
            if math.isnan(total):
                _log.warning("line %d: the model gives no probabilities: its score means nothing", first + index)
            score = penalised(total, length - 1, decoder.config.length_penalty)
            pieces = tuple(tokenizer.pieces(targets[index][:-1]))
            scored[index] = Scored(pieces, tuple(values.tolist()), total, score)
            statistics.source_tokens += len(sources[index])
            statistics.target_tokens += length - 1
    statistics.lines += len(window)
    statistics.sentences += len(window)
    return scored
