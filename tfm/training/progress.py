"""What is told of a run's steps, how fast they are, and when they are good for nothing any more."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax

from tfm.config import Config
from tfm.training.metrics import MetricsWriter

_log = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """Too many updates in a row were not finite. The parameters are still good: each of these updates was skipped."""


class Progress:
    """Turns the metrics of steps into events, and notices when the updates stop being finite."""

    def __init__(self, writer: MetricsWriter | None, config: Config, last_checkpoint: Callable[[], str]):
        self.writer, self.config, self.last_checkpoint = writer, config, last_checkpoint
        self._is_first = True  # the first step waits for the compiler, and has no rate
        self._start_interval()

    def record(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Waits for the step and takes note of it; an event every `training.log_every` steps.

        Raises TrainingDiverged after `training.max_skipped_steps` updates in a row that were not finite.
        """
        numbers = {name: value.item() for name, value in jax.device_get(dict(metrics)).items()}
        skipped_in_a_row = int(numbers.pop("skipped_in_a_row"))
        self._steps += 1
        self._source_tokens += numbers.pop("source_tokens")
        self._target_tokens += numbers.pop("target_tokens")
        if skipped_in_a_row:
            _log.warning("step %d: the loss or its gradient is not finite; the update was skipped", step)
        if step % self.config.training.log_every == 0 and self.writer is not None:
            rates = {} if self._is_first else self._rates()
            self.writer.write(
                {"step": step, "kind": "train", **numbers, "perplexity": perplexity(numbers["nll"]), **rates}
            )
            self._start_interval()
        elif self._is_first:
            self._start_interval()
        self._is_first = False
        if skipped_in_a_row >= self.config.training.max_skipped_steps:
            raise TrainingDiverged(
                f"step {step}: {skipped_in_a_row} updates in a row were not finite, and none of them was applied; the "
                f"last good checkpoint: {self.last_checkpoint()}; lower optimizer.learning_rate or set "
                "optimizer.clip_norm, in a new --workdir, or look at the data of these steps"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluating and saving do not count as training time."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def _rates(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._started, 1e-9)
        return {
            "source_tokens_per_second": self._source_tokens / seconds,
            "target_tokens_per_second": self._target_tokens / seconds,
            "steps_per_second": self._steps / seconds,
        }

    def _start_interval(self) -> None:
        self._started = time.perf_counter()
        self._steps, self._source_tokens, self._target_tokens = 0, 0.0, 0.0


def perplexity(nll: float) -> float:
    """Of so many nats a token."""
    return math.exp(nll) if nll < 700 else math.inf
