"""The time of a training step: `Trainer.train_step` itself, compiled ahead of time, over packed batches."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tfm import device_memory, hosts, sharding
from tfm.benchmarking import programs
from tfm.benchmarking.peak import MatmulPeak
from tfm.benchmarking.profile import profiled
from tfm.benchmarking.rates import per_second, utilisation
from tfm.benchmarking.synthetic import SyntheticStore, SyntheticTable
from tfm.config import Config, ConfigError
from tfm.data.batches import Batch, TrainBatches
from tfm.data.store import open_store, prepare, store_directory
from tfm.device_memory import OutOfDeviceMemory
from tfm.model.flops import train_step_flops
from tfm.model.transformer import count_parameters
from tfm.training.step import Trainer, TrainState, trainer_of

DISTINCT_BATCHES = 4  # that steps go round over where the input pipeline is left out
_PROFILED_STEPS = 3
_NO_CHUNKS = 2**62

Lengths = Literal["full", "natural", "corpus"]


@dataclasses.dataclass(frozen=True)
class TrainTiming:
    """What is timed, and how often."""

    lengths: Lengths = "natural"
    """Pairs that fill a row each, lengths like those of a news corpus, or the pairs of the config's own corpus."""
    pipeline: bool = False
    """Batches come from the reader that training has, which runs beside the steps, and not from the device's memory."""
    steps: int = 20
    warmup: int = 3
    profile: Path | None = None
    """Directory for a trace of a few more steps."""


class Workload(NamedTuple):
    """Batches and what the model has to know of them."""

    vocab_size: int
    batches: TrainBatches


@contextlib.contextmanager
def workload(config: Config, lengths: Lengths) -> Iterator[Workload]:
    """The packed batches of a run, on its own corpus or on synthetic pairs.

    The corpus is read from the token store `data.store`, or prepared in a directory of its own that goes at the end.

    Raises InputError where the corpus cannot be used.
    """
    data = config.data
    if lengths != "corpus":
        row_lengths = (data.source_row_length, data.target_row_length)
        pairs_in_a_row = 1 if lengths == "full" else 1 + max(row_lengths) // 8
        table = SyntheticTable(
            lengths, row_lengths, data.vocab_size, 2 * DISTINCT_BATCHES * config.rows_per_batch * pairs_in_a_row
        )
        yield Workload(data.vocab_size, TrainBatches(SyntheticStore(table), data.train_split, config))
        return
    if not data.store and hosts.count() > 1:
        raise ConfigError("data.store: several hosts read one token store: name a directory that all of them see")
    with tempfile.TemporaryDirectory() as temporary:
        directory = store_directory(config, temporary)
        store = hosts.first_does(lambda: prepare(config, directory)) or open_store(directory, data.cache_dir)
        yield Workload(store.tokenizer.vocab_size, TrainBatches(store, data.train_split, config, remember=False))


def time_training(config: Config, devices: Sequence[Any], timing: TrainTiming, peak: MatmulPeak) -> dict[str, Any]:
    """Times training steps; the keys of the result are those of the command's JSON.

    Args:
      config: of the run.
      devices: that the mesh is made of.
      timing: what is timed.
      peak: of matrix products on these devices, which have another try after the timing.

    Raises:
      InputError: no corpus, or rows or parameters that don't divide over the mesh.
      OutOfDeviceMemory: a batch that doesn't fit, and which one does.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    with workload(config, timing.lengths) as (vocab_size, batches), jax.set_mesh(mesh):
        trainer = trainer_of(config, vocab_size, mesh)
        try:
            with device_memory.explained(_batch_of(config)):
                steps = _Steps(trainer, batches, timing)
                seconds = steps.timed()
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(f"{error}; {_hint(config, vocab_size, mesh)}", error.needed, error.room) from error
        used = collections.Counter(steps.used)
        contents = _contents([batches.host_batch(k) for k in used], list(used.values()))
        trace = None
        if timing.profile is not None:
            trace = profiled(timing.profile, steps.compiled, steps.step, _PROFILED_STEPS, "update")
        median = float(np.median(seconds))
        memory = programs.memory(steps.compiled, list(devices))  # before the peak's matrices are made again
        shape = (batches.rows_per_batch, batches.source_length, batches.target_length)
        return {
            "lengths": timing.lengths,
            "pipeline": timing.pipeline,
            "devices": len(devices),
            "mesh": dict(mesh.shape),
            "dtype": trainer.model.dtype.name,
            "parameters": count_parameters(trainer.model),
            "vocab_size": vocab_size,
            **dict(zip(("rows_per_batch", "source_row_length", "target_row_length"), shape, strict=True)),
            "warmup_steps": timing.warmup,
            "steps": timing.steps,
            **steps.compile_seconds,
            **programs.spread("step", seconds),
            **per_second(contents, median, len(devices)),
            **_padding(contents, *shape),
            **utilisation(
                train_step_flops(config.model, vocab_size, *shape),
                unrolled_flops(config, vocab_size, mesh),
                median,
                devices=len(devices),
                device_kind=devices[0].device_kind,
                dtype=trainer.model.dtype.name,
                matmul_peak_flops=peak.again(),
            ),
            **memory,
            "collectives": programs.collectives(steps.compiled, len(devices)),
            "loss": steps.loss,
            **({} if trace is None else {"profile": trace}),
        }


class _Steps:
    """Training steps one after another, each waited for."""

    def __init__(self, trainer: Trainer, batches: TrainBatches, timing: TrainTiming):
        self.used: list[int] = []
        """Number of the batch of each timed step."""
        self._rows = sharding.batch_sharding(trainer.mesh)
        self._batches, self._timing = batches, timing
        self._read_ahead = trainer.config.data.read_ahead
        one = batches.global_batch(0, self._rows)
        self.compiled, self.compile_seconds = programs.compiled_in_stages(
            trainer.train_step, trainer.abstract_state, one
        )
        programs.refuse_larger(self.compiled, _batch_of(trainer.config), trainer.mesh.local_devices[0])
        self._state: TrainState = trainer.init()
        self._metrics: Any = None
        self._held = None if timing.pipeline else [one, *self._later_batches()]
        jax.block_until_ready((self._state, self._held))  # or the first step would wait for them

    def _later_batches(self) -> Iterator[Batch]:
        for k in range(1, DISTINCT_BATCHES):
            yield self._batches.global_batch(k, self._rows)

    @property
    def loss(self) -> float:
        """Of the newest step."""
        return float(self._metrics["loss"])

    def step(self, batch: Batch | None = None) -> Any:
        """One update, on its way; what it gives can be waited for."""
        batch = batch or (self._held[0] if self._held else self._batches.global_batch(0, self._rows))
        self._state, self._metrics = self.compiled(self._state, batch)
        return self._state, self._metrics

    def timed(self) -> list[float]:
        """Seconds of each timed step, the wait for its batch included."""
        count = self._timing.warmup + self._timing.steps
        with contextlib.closing(self._stream(count)) as stream:
            seconds = []
            for number in range(count):
                start = time.perf_counter()
                k, batch = next(stream)
                jax.block_until_ready(self.step(batch))
                seconds.append(time.perf_counter() - start)
                if number >= self._timing.warmup:
                    self.used.append(k)
        return seconds[self._timing.warmup :]

    def _stream(self, count: int) -> Iterator[tuple[int, Batch]]:
        if self._held is None:
            # More than are used, so that the reader is at work beside the last step, too.
            yield from self._batches.read_ahead(0, count + 2 * self._read_ahead, self._rows)
            return
        for number in range(count):
            k = number % len(self._held)
            yield k, self._held[k]


def _hint(config: Config, vocab_size: int, mesh: Mesh) -> str:
    """How many rows do fit: the largest power of two, or of multiples of what the rows have to divide by."""
    least = sharding.batch_shards(mesh) * config.training.gradient_accumulation

    def fits(times: int) -> bool:
        smaller = config.with_rows(times * least)
        trainer = trainer_of(smaller, vocab_size, mesh)
        with jax.set_mesh(mesh):
            lowered = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch())
        return programs.fits(lowered, mesh.local_devices[0])

    times = programs.largest_power_of_two(-(-config.rows_per_batch // least), fits)
    if times is None:
        return f"not even {least} fit"
    rows = times * least
    what = "power of two" if least & (least - 1) == 0 else f"power of two times {least}"
    tokens = rows * config.data.target_row_length
    return f"{rows:,} rows fit, the largest {what} that does: --training.target_tokens_per_batch={tokens}"


def _batch_of(config: Config) -> str:
    tokens = config.training.target_tokens_per_batch
    return f"a step of {config.rows_per_batch:,} rows (training.target_tokens_per_batch={tokens})"


def unrolled_flops(config: Config, vocab_size: int, mesh: Mesh) -> float | None:
    """FLOPs that XLA counts in one training step over all devices; None where it cannot.

    Of the program with every loop unrolled (layers, micro-batches, pieces of the logits), before it is optimised: XLA
    counts what is in a loop once. What rematerialisation computes again is in it, and so is what is no matrix product.
    """
    depth = max(config.model.encoder_layers, config.model.decoder_layers)
    tokens = config.rows_per_batch * config.data.target_row_length
    training = dataclasses.replace(
        config.training, unroll_layers=depth, gradient_accumulation=1, target_tokens_per_batch=tokens
    )
    # And without kernels, of which XLA knows nothing but what they declare.
    model = dataclasses.replace(config.model, attention="plain")
    trainer = trainer_of(dataclasses.replace(config, model=model, training=training), vocab_size, mesh)
    trainer.logits_per_chunk = _NO_CHUNKS
    with jax.set_mesh(mesh):
        return programs.lowered_flops(trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()))


def _contents(batches: Sequence[Batch], times: Sequence[int]) -> dict[str, float]:
    """What a batch holds, on average over so many steps with each: tokens that are no padding, and sentence pairs."""

    def mean(counts: list[int]) -> float:
        return float(np.average(counts, weights=times))

    source = mean([np.count_nonzero(batch.source_segments) for batch in batches])
    target = mean([np.count_nonzero(batch.target_segments) for batch in batches])
    pairs = mean([batch.target_segments.max(axis=1).sum() for batch in batches])
    return {
        "source_tokens": source,
        "target_tokens": target,
        "non_padding_tokens": source + target,
        "sentences": pairs,
    }


def _padding(contents: dict[str, float], rows: int, source_length: int, target_length: int) -> dict[str, float]:
    """Share of the positions of either side that hold no token."""
    return {
        "source_padding": 1 - contents["source_tokens"] / (rows * source_length),
        "target_padding": 1 - contents["target_tokens"] / (rows * target_length),
    }
