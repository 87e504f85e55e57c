"""What translate, score and evaluate have in common: whom they ask, how they begin, what they tell at the end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tfm.config import Config

if TYPE_CHECKING:
    from tfm.decoding.translator import Translator

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)  # so that a command may have options of its own that are required
class Models:
    """Options that say which models are asked."""

    workdir: str
    """Directory of the run."""
    checkpoint: str | None = None
    """Which parameters: a step, last, best, or the mean last:N or best:N; decoding.average, or the best, if unset."""
    ensemble: tuple[str, ...] = ()
    """Further models that are asked as well, WORKDIR or WORKDIR@CHECKPOINT, which have to share the run's tokenizer."""


@contextmanager
def translating(config: Config, scoring: bool = False) -> Iterator[None]:
    """Every core translates or scores, other hosts do so together; to be entered before anything asks for a device.

    Raises OutOfDeviceMemory, saying what helps, where the devices' memory runs out.
    """
    from tfm import backend, device_memory, hosts

    backend.use_compilation_cache()
    backend.decode_on_every_core()
    what_and_remedy = device_memory.SCORING if scoring else device_memory.TRANSLATING
    with hosts.together(config), device_memory.explained(*what_and_remedy):
        yield


def log_rate(translator: Translator, seconds: float) -> None:
    """What was done, how fast, and with how many compiled shapes."""
    done, compiled = translator.statistics, translator.decoder.compile_stages
    seconds = max(seconds, 1e-9)
    _log.info(
        "%s lines in %.1f s: %.1f lines/s, %.1f sentences/s, %.0f source and %.0f target tokens/s, "
        "%.1f %% of the source side padding, %.1f %% of the sentences decoded twice; %d shapes compiled in %.1f s",
        *(f"{done.lines:,}", seconds, done.lines / seconds, done.sentences / seconds, done.source_tokens / seconds),
        *(done.target_tokens / seconds, 100 * done.padding, 100 * done.again / max(done.sentences, 1)),
        *(len(compiled), sum(map(sum, compiled.values()))),
    )
