"""Events out of the metrics of steps, on a clock of the test's own; how a run diverges is in test_loop."""

import math

import pytest

from tfm.training import progress as module
from tfm.training.progress import Progress, perplexity

COMPILING, STEP = 60.0, 0.5  # seconds


class Clock:
    """Stands still unless it is told to go on."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scalar(float):
    def item(self) -> float:
        return float(self)


def metrics() -> dict:
    values = {"nll": 1.0, "skipped_in_a_row": 0.0, "source_tokens": 8.0, "target_tokens": 10.0}
    return {name: Scalar(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("log_every", "rates"),
    [
        (4, {4: 2.0, 8: 2.0}),  # of the three steps that were not waited for together with the compiler, then of four
        (1, {2: 2.0, 3: 2.0}),
    ],
)
def test_rates_are_of_training_not_of_compiling_evaluating_and_saving(log_every, rates, tiny_config, monkeypatch):
    clock, events = Clock(), []
    monkeypatch.setattr(module, "time", clock)
    writer = type("Writer", (), {"write": lambda self, event: events.append(event)})()
    progress = Progress(writer, tiny_config({"training.log_every": log_every}), lambda: "none yet")
    for step in range(1, max(rates) + 1):
        clock.now += STEP + (COMPILING if step == 1 else 0)
        progress.record(step, metrics())
        with progress.paused():
            clock.now += 1000
    assert [event["step"] for event in events] == list(range(log_every, max(rates) + 1, log_every))
    assert {e["step"]: e["steps_per_second"] for e in events if "steps_per_second" in e} == pytest.approx(rates)
    assert events[-1]["target_tokens_per_second"] == pytest.approx(20.0)
    assert events[-1]["perplexity"] == pytest.approx(math.e)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert perplexity(1e4) == math.inf
