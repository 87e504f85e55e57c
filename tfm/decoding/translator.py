"""Text in, text out: one translation for each line, in the order given."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tfm import sharding
from tfm.checkpoint import CheckpointReader, RunDirectory
from tfm.config import Config, DecodingConfig, InputError
from tfm.data.tokenizer import EOS, Tokenizer
from tfm.decoding.decoder import Bucket, Decoder
from tfm.model.transformer import Transformer, abstract_parameters, compute_dtype

_log = logging.getLogger(__name__)

# Lines that are sorted into buckets together: enough to fill them, and all that is ever held of an endless stream.
WINDOW_LINES = 8192

# Chinese and Japanese put no blank after a full stop, but may close a quotation or a bracket.
_SENTENCE_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])(?![。！？」』”’）])\s*")


@dataclass(frozen=True)
class Translation:
    """The translation of one line."""

    text: str
    log_prob: float
    """Log-probability of the tokens, in nats; of all pieces together where the line was cut."""


class Translator:
    """Translates lines with parameters that can be exchanged.

    Args:
      model: the Transformer.
      mesh: the devices to decode on.
      tokenizer: the one that the model was trained with.
      config: search and shapes.
    """

    def __init__(self, model: Transformer, mesh: Mesh, tokenizer: Tokenizer, config: DecodingConfig):
        self.tokenizer, self.config = tokenizer, config
        self.decoder = Decoder(model, mesh, config, tokenizer.banned_ids)
        self.steps: tuple[int, ...] = ()
        """The checkpoints that the parameters are of, where they come from a run directory."""

    @classmethod
    def load(cls, workdir: str | Path, config: Config | None = None, checkpoint: str | int | None = None) -> Translator:
        """The translator of a run directory.

        Args:
          workdir: the run directory.
          config: the run's config with another mesh or decoding; as the run has it, when None.
          checkpoint: a step, last, best, last:N or best:N (the mean of N); `decoding.average`, or the best, when None.

        Raises InputError where there is no usable run.
        """
        run = RunDirectory.open(workdir)
        config = (config or run.config).validate()
        if not run.tokenizer_path.exists():
            raise InputError(f"{run.tokenizer_path}: is missing: the run directory is not whole")
        tokenizer = Tokenizer.load(run.tokenizer_path)
        mesh = sharding.make_mesh(config.mesh)
        dtype = compute_dtype(config.model, mesh.devices.flat[0].platform)
        model = Transformer(config.model, tokenizer.vocab_size, dtype)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
            sharding.unboxed(abstract_parameters(model)),
        )
        which = checkpoint if checkpoint is not None else config.decoding.average
        restored = CheckpointReader(run).restore_parameters(abstract, which)
        _log.info("%s: translates with the parameters of step %s", run.path, ", ".join(map(str, restored.steps)))
        translator = cls(model, mesh, tokenizer, config.decoding)
        translator.set_parameters(restored.state)
        translator.steps = restored.steps
        return translator

    def set_parameters(self, parameters: Any) -> None:
        """Parameters as training has them."""
        self.decoder.set_parameters(parameters)

    def translate(self, lines: Iterable[str]) -> list[Translation]:
        """One translation for each line, in their order; that of an empty or blank line is empty."""
        return list(self.stream(lines))

    def stream(self, lines: Iterable[str], window: int | None = None) -> Iterator[Translation]:
        """As `translate`, for a stream of any length: at most `window` lines (`WINDOW_LINES` when None) are held."""
        remaining = iter(lines)
        first = 1
        while held := list(islice(remaining, window or WINDOW_LINES)):
            yield from self._translate_window(held, first)
            first += len(held)

    def _translate_window(self, lines: Sequence[str], first: int) -> list[Translation]:
        pieces = self._pieces(lines, first)
        buckets: dict[Bucket, list[int]] = defaultdict(list)
        for index, (_, ids) in enumerate(pieces):
            buckets[self.decoder.bucket_of(len(ids))].append(index)
        started = []
        for bucket, members in sorted(buckets.items()):
            for at in range(0, len(members), bucket.rows):
                batch = members[at : at + bucket.rows]
                started.append((batch, self.decoder.decode(bucket, [pieces[i][1] for i in batch])))
        results: list[tuple[str, float]] = [("", 0.0)] * len(pieces)
        for batch, hypotheses in started:
            tokens, lengths, log_probs = (np.asarray(part)[:, 0] for part in hypotheses)
            texts = self.tokenizer.decode([tokens[row, : lengths[row]].tolist() for row in range(len(batch))])
            for row, index in enumerate(batch):
                results[index] = (texts[row], float(log_probs[row]))
        texts: list[list[str]] = [[] for _ in lines]
        scores = [0.0] * len(lines)
        for (line, _), (text, log_prob) in zip(pieces, results, strict=True):
            texts[line].append(text)
            scores[line] += log_prob
        return [
            Translation(" ".join(part for part in parts if part), score)
            for parts, score in zip(texts, scores, strict=True)
        ]

    def _pieces(self, lines: Sequence[str], first: int) -> list[tuple[int, list[int]]]:
        """(index of the line, token ids ending in EOS) of each piece; a line is one piece unless it is too long."""
        pieces = []
        for index, ids in enumerate(self.tokenizer.encode(list(lines))):
            if len(ids) + 1 <= self.config.max_source_length:
                if ids:
                    pieces.append((index, [*ids, EOS]))
                continue
            parts = list(self._cut(lines[index]))
            _log.warning(
                "line %d has %d tokens, more than decoding.max_source_length=%d: translated in %d pieces",
                *(first + index, len(ids), self.config.max_source_length, len(parts)),
            )
            pieces.extend((index, [*part, EOS]) for part in parts)
        return pieces

    def _cut(self, line: str) -> Iterator[list[int]]:
        """Token ids of pieces that fit, cut between sentences, or else words, or else anywhere."""
        room = self.config.max_source_length - 1
        for unit in self._units(_SENTENCE_ENDS.split(line), room):
            if len(unit) <= room:
                yield unit
            else:
                yield from (unit[at : at + room] for at in range(0, len(unit), room))

    def _units(self, parts: list[str], room: int) -> Iterator[list[int]]:
        """Neighbouring parts joined as long as they fit; a part that doesn't fit is cut into words, and a word in two.

        A word is cut as text: its ids may be bytes, and a character cut in two would be none.
        """
        joined: list[int] = []
        for part, ids in zip(parts, self.tokenizer.encode(parts), strict=True):
            if joined and len(joined) + len(ids) > room:
                yield joined
                joined = []
            words = part.split()
            if len(words) == 1:
                words = [part[: len(part) // 2], part[len(part) // 2 :]]
            if len(ids) > room and all(words):
                yield from self._units(words, room)
            else:
                joined = joined + ids
        if joined:
            yield joined
