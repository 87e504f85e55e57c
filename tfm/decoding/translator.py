"""Text in, text out: one translation for each line, in the order given."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tfm import sharding
from tfm.allocator import give_back_freed_memory
from tfm.config import Config, DecodingConfig, InputError
from tfm.data.tokenizer import EOS, Tokenizer
from tfm.decoding.cutting import cut
from tfm.decoding.decoder import Bucket, Decoder, bucket_of
from tfm.decoding.inputs import checked, in_step, several
from tfm.decoding.loading import load_models
from tfm.decoding.scoring import score_windows
from tfm.decoding.search import Hypotheses
from tfm.decoding.translation import Hypothesis, Scored, Statistics, Translation, penalised
from tfm.decoding.windows import Windows, patience, window_lines
from tfm.model.transformer import Transformer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """A line, or a part of one that was cut: what is decoded as one sentence."""

    line: int  # index within its window
    ids: list[int]  # ending in EOS
    prefix: list[int]
    draw: tuple[int, int]  # by which the draws of one sentence differ from those of another: its line and its part


@dataclass(frozen=True)
class _Window:
    """Lines that are translated together."""

    first: int  # number of its first line
    lines: int
    pieces: list[_Piece]


_Started = tuple[list[int], Hypotheses]  # which pieces of a window, and what is being made of them


class Translator:
    """Translates lines with parameters that can be exchanged, of one model or of several together.

    Args:
      models: the Transformers.
      mesh: the devices to decode on.
      tokenizer: the one that the models were trained with.
      config: search and shapes.
      scores: whether the scores of translations are wanted. Greedy search is quicker without; others need them.
    """

    def __init__(
        self,
        models: Sequence[Transformer],
        mesh: Mesh,
        tokenizer: Tokenizer,
        config: DecodingConfig,
        *,
        scores: bool = True,
    ):
        self.tokenizer, self.config = tokenizer, config
        self.decoder = Decoder(models, mesh, config, tokenizer.banned_ids, scores=scores)
        self._window_lines = window_lines(self.decoder.buckets[0].rows)
        self.steps: tuple[int, ...] = ()
        """The checkpoints that the parameters are of, where they come from a run directory."""
        self.statistics = Statistics()

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        config: Config | None = None,
        checkpoint: str | int | None = None,
        ensemble: Sequence[str] = (),
        mesh: Mesh | None = None,
        scores: bool = True,
    ) -> Translator:
        """The translator of a run directory.

        Args:
          workdir: the run directory.
          config: the run's config with another `mesh.tensor` or decoding; as the run has it, when None.
          checkpoint: a step, last, best, last:N or best:N (the mean of N); `decoding.average`, or the best, when None.
          ensemble: further models to translate with, WORKDIR or WORKDIR@CHECKPOINT, of the same tokenizer.
          mesh: the devices to decode on; all there are, with `mesh.tensor` of the config, when None.
          scores: as for the constructor.

        Raises:
          InputError: no usable run, one with another tokenizer, or a config of another model.
          ConfigError: a `mesh.tensor` that does not divide the model.
        """
        loaded = load_models(workdir, config, checkpoint, ensemble, mesh)
        translator = cls(loaded.models, loaded.mesh, loaded.tokenizer, loaded.config.decoding, scores=scores)
        translator.set_parameters(*loaded.parameters)
        translator.steps = loaded.steps
        return translator

    def set_parameters(self, *parameters: Any) -> None:
        """Parameters as training has them, of each model."""
        self.decoder.set_parameters(*parameters)

    @contextlib.contextmanager
    def with_parameters(self, *parameters: Any) -> Iterator[None]:
        """Parameters as training has them, of each model, whose copy for decoding is given back at the end."""
        self.set_parameters(*parameters)
        try:
            yield
        finally:
            self.decoder.drop_parameters()

    def translate(self, lines: Iterable[str], prefixes: Iterable[str] | None = None) -> list[Translation]:
        """One translation for each line, in their order; that of an empty or blank line is empty.

        Args:
          lines: of text.
          prefixes: text that the translation of each line begins with; an empty one leaves it free.

        Raises:
          InputError: prefixes that are more or fewer than the lines, too long, or of what is never generated.
          TypeError: one text in place of several, or what is none.
        """
        return [translation for window in self.windows(lines, prefixes) for translation in window]

    def windows(
        self, lines: Iterable[str], prefixes: Iterable[str] | None = None, first: int = 1
    ) -> Iterator[list[Translation]]:
        """As `translate`, for a stream of any length or speed: translations as soon as there are any, in order.

        What is there is translated at once, up to `window_lines`; while the devices work, the next lines are read and
        tokenized, and the last ones detokenized. `first` is the number of the first line, in messages and for draws.
        Raises what `translate` does, once what stands before has been given.
        """
        lines = checked(several(lines, "lines"), "line", first)
        has_prefixes = prefixes is not None
        if has_prefixes:
            pairs = in_step(lines, checked(several(prefixes, "prefixes"), "prefix", first), "prefixes", first)
        else:
            pairs = ((line, "") for line in lines)
        # What begins with a prefix may well go on for longer than its source lets expect.
        shapes = self.decoder.long_buckets if has_prefixes else self.decoder.buckets
        with contextlib.closing(Windows(pairs, self._window_lines, patience())) as windows:
            before: tuple[_Window, list[_Started]] | None = None
            while before is not None or not windows.ended:
                window, refused = self._window(windows.take(wait=before is None), first, has_prefixes)
                first += window.lines
                if before is not None:
                    before = before[0], before[1] + self._again(*before)
                started = self._decode(shapes, window.pieces, range(len(window.pieces)), has_prefixes)
                if before is not None:
                    yield self._finish(*before)
                before = (window, started) if window.lines else None
                if refused is not None:
                    if before is not None:
                        yield self._finish(window, started + self._again(*before))
                    raise refused

    def _again(self, window: _Window, started: Sequence[_Started]) -> list[_Started]:
        """Waits for a window, and has the devices begin anew with what was given up, with more room."""
        given_up = [
            index
            for batch, hypotheses in started
            for index, is_whole in zip(batch, sharding.on_host(hypotheses.is_whole_B), strict=False)
            if not is_whole
        ]
        self.statistics.again += len(given_up)
        return self._decode(self.decoder.long_buckets, window.pieces, given_up, has_prefixes=False)

    def _decode(
        self, shapes: Sequence[Bucket], pieces: Sequence[_Piece], which: Iterable[int], has_prefixes: bool
    ) -> list[_Started]:
        """Has the devices begin with some pieces, in their buckets."""
        buckets: dict[Bucket, list[int]] = defaultdict(list)
        for index in which:
            buckets[bucket_of(shapes, len(pieces[index].ids))].append(index)
        started: list[_Started] = []
        for bucket, members in sorted(buckets.items()):
            # Those of one length end together, or nearly so: none waits long for the others of its batch.
            members.sort(key=lambda index: len(pieces[index].ids))
            for at in range(0, len(members), bucket.rows):
                batch = members[at : at + bucket.rows]
                sentences = [pieces[i].ids for i in batch]
                prefixes = [pieces[i].prefix for i in batch] if has_prefixes else None
                hypotheses = self.decoder.decode(bucket, sentences, prefixes, [pieces[i].draw for i in batch])
                started.append((batch, hypotheses))
                self.statistics.padded_tokens += bucket.rows * bucket.length
        return started

    def _finish(self, window: _Window, started: Sequence[_Started]) -> list[Translation]:
        """The translations of a window, of whose pieces those that were begun anew come last."""
        found: list[list[Hypothesis]] = [[] for _ in window.pieces]
        for batch, hypotheses in started:
            for index, its in zip(batch, self._hypotheses(hypotheses, len(batch)), strict=True):
                found[index] = its
        of_lines: list[list[list[Hypothesis]]] = [[] for _ in range(window.lines)]
        for piece, hypotheses in zip(window.pieces, found, strict=True):
            of_lines[piece.line].append(hypotheses)
            if not math.isfinite(hypotheses[0].log_prob):
                number = window.first + piece.line
                _log.warning("line %d: no translation has a finite probability: what is written means nothing", number)
        self.statistics.lines += window.lines
        self.statistics.sentences += len(window.pieces)
        self.statistics.source_tokens += sum(len(piece.ids) for piece in window.pieces)
        if window.lines == self._window_lines:
            give_back_freed_memory()
        return [Translation(_joined(parts)) for parts in of_lines]

    def _hypotheses(self, hypotheses: Hypotheses, rows: int) -> list[list[Hypothesis]]:
        """The hypotheses of each row of a batch, as text; the first always, others if there are any."""
        tokens, lengths, log_probs, is_whole = (part[:rows] for part in sharding.on_host(hypotheses))
        is_there = np.isfinite(log_probs) & is_whole[:, None]
        is_there[:, 0] = True
        rows_and_ranks = np.argwhere(is_there)
        ids = [tokens[row, rank, : lengths[row, rank]].tolist() for row, rank in rows_and_ranks]
        found: list[list[Hypothesis]] = [[] for _ in range(rows)]
        # A beam has several spellings of a text, where a model was trained on such; of draws, each counts.
        told: list[set[str]] = [set() for _ in range(rows)]
        for (row, rank), text, its in zip(rows_and_ranks, self.tokenizer.decode(ids), ids, strict=True):
            if text in told[row] and not self.config.sampling:
                continue
            told[row].add(text)
            log_prob = float(log_probs[row, rank])
            pieces = tuple(self.tokenizer.pieces(its))
            score = penalised(log_prob, len(its), self.config.length_penalty)
            found[row].append(Hypothesis(text, pieces, log_prob, score))
        self.statistics.target_tokens += int(np.sum(lengths[is_whole, 0]))
        return found

    def _window(
        self, pairs: Sequence[tuple[str, str]], first: int, has_prefixes: bool
    ) -> tuple[_Window, InputError | None]:
        """Lines and their prefixes as pieces; where a prefix is refused, the lines before it, and the reason."""
        prefixes = self.tokenizer.encode([prefix for _, prefix in pairs]) if has_prefixes else [[]] * len(pairs)
        pieces: list[_Piece] = []
        for index, ids in enumerate(self.tokenizer.encode([line for line, _ in pairs])):
            number = first + index
            parts = self._parts(pairs[index][0], ids, number)
            try:
                self._check_prefix(prefixes[index], parts, number)
            except InputError as refused:
                return _Window(first, index, pieces), refused
            for part, part_ids in enumerate(parts):
                prefix = prefixes[index] if part == 0 else []
                pieces.append(_Piece(index, [*part_ids, EOS], prefix, (number % 2**32, part)))
        return _Window(first, len(pairs), pieces), None

    def _parts(self, line: str, ids: list[int], number: int) -> list[list[int]]:
        """The token ids of a line's parts: one unless it is too long, and none where it is blank."""
        room = self.config.max_source_length - 1
        if len(ids) <= room:
            return [ids] if ids else []
        parts = list(cut(line, self.tokenizer, room))
        _log.warning(
            "line %d has %d tokens, end included, more than decoding.max_source_length=%d: translated in %d pieces",
            *(number, len(ids) + 1, self.config.max_source_length, len(parts)),
        )
        return parts

    def _check_prefix(self, prefix: Sequence[int], parts: Sequence[Sequence[int]], number: int) -> None:
        if parts and len(prefix) > (most := len(parts[0]) + self.config.max_extra_tokens):
            raise InputError(
                f"line {number}: its prefix has {len(prefix)} tokens, and its translation may have {most}, the "
                "source's and decoding.max_extra_tokens: shorten the one or raise the other"
            )
        if banned := set(prefix) & set(self.tokenizer.banned_ids):
            raise InputError(
                f"line {number}: its prefix has {', '.join(self.tokenizer.pieces(sorted(banned)))}, which is never "
                "generated: leave it out"
            )

    def score(self, sources: Iterable[str], targets: Iterable[str | Sequence[str]]) -> list[Scored]:
        """The log-probability of each target as a translation of its source; 0 where both are blank.

        Args:
          sources: lines of text.
          targets: lines of text, or the pieces of each, such as `Hypothesis.tokens`, which may be pieces that the
            tokenizer would not have cut the text into.

        Raises:
          InputError: a piece that the tokenizer doesn't have, or more lines on one side than on the other.
          TypeError: one text in place of several, or what is none.
        """
        return [scored for window in self.score_windows(sources, targets) for scored in window]

    def score_windows(self, sources: Iterable[str], targets: Iterable[str | Sequence[str]]) -> Iterator[list[Scored]]:
        """As `score`, for streams of any length."""
        return score_windows(self.decoder, self.tokenizer, self.statistics, sources, targets)


def _beside(text: str, more: str) -> str:
    """Two texts with a blank between them, but for scripts that are written without."""
    blank = " " if text and not (_without_blanks(text[-1]) or _without_blanks(more[0])) else ""
    return text + blank + more


def _without_blanks(character: str) -> bool:
    """Whether it is Chinese or Japanese; Korean has blanks, and an emoji, as wide as they are, is a symbol (S)."""
    is_wide = unicodedata.east_asian_width(character) in ("W", "F") and unicodedata.category(character)[0] != "S"
    return is_wide and "HANGUL" not in unicodedata.name(character, "")


def _joined(parts: Sequence[Sequence[Hypothesis]]) -> tuple[Hypothesis, ...]:
    """The hypotheses of a line out of those of its parts: the best of each part together, then the second ones, …"""
    if len(parts) == 1:
        return tuple(parts[0])
    joined = []
    for rank in range(max(map(len, parts), default=1)):
        its = [part[min(rank, len(part) - 1)] for part in parts]
        joined.append(
            Hypothesis(
                functools.reduce(_beside, (one.text for one in its if one.text), ""),
                tuple(token for one in its for token in one.tokens),
                math.fsum(one.log_prob for one in its),
                math.fsum(one.score for one in its),
            )
        )
    return tuple(joined)
