"""A benchmark from its options to its report: one point, or a sweep along batch, length or devices."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tfm import backend, hosts, sharding
from tfm.benchmarking.decode import BANNED, DecodeTiming, time_decoding
from tfm.benchmarking.peak import MatmulPeak
from tfm.benchmarking.report import report
from tfm.benchmarking.train import TrainTiming, time_training
from tfm.config import Config, ConfigError, InputError
from tfm.decoding.decoder import check_beam
from tfm.device_memory import OutOfDeviceMemory
from tfm.model.transformer import compute_dtype
from tfm.text import near
from tfm.training.step import trainer_of

_log = logging.getLogger(__name__)

AXES = ("batch", "length", "devices")

MakePeak = Callable[[Sequence[Any], jnp.dtype], MatmulPeak]
Keep = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The values that one thing takes, while all else stays."""

    axis: str
    """One of AXES."""
    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """`batch=32,64,128`. Raises InputError saying what was expected."""
        axis, _, listed = text.partition("=")
        if axis not in AXES:
            hint = near(axis, AXES, otherwise=f"; there are {', '.join(AXES)}")
            raise InputError(f"--sweep={text}: no axis {axis!r}{hint}")
        values = [value.strip() for value in listed.split(",")]
        if not all(value.isdecimal() and int(value) > 0 for value in values):
            raise InputError(f"--sweep={text}: expected whole numbers above 0, such as --sweep={axis}=1,2,4")
        return cls(axis, tuple(dict.fromkeys(map(int, values))))


class _Peaks:
    """The peak of each number of devices, measured once when it is first asked for."""

    def __init__(self, config: Config, make: MakePeak):
        self._config, self._make = config, make
        self.by_devices: dict[int, MatmulPeak] = {}

    def of(self, devices: Sequence[Any]) -> MatmulPeak:
        if len(devices) not in self.by_devices:
            dtype = compute_dtype(self._config.model, devices[0].platform)
            peak = self.by_devices[len(devices)] = self._make(devices, dtype)
            _log.info(
                "%d device(s): matrix products reach %.4g FLOP/s (%s, size %d)",
                len(devices),
                peak.flops,
                peak.best["library"],
                peak.best["size"],
            )
        return self.by_devices[len(devices)]


def devices_for(count: int | None, sweep: Sweep | None) -> list[Any]:
    """The devices of a benchmark: `count` of them, or as many as a sweep along them takes at most, or all.

    To be called before anything asks for a device: those of a CPU are made here, simulated.

    Raises ConfigError where there are fewer, and where several hosts should measure a part of what they have.
    """
    counts = sweep.values if sweep is not None and sweep.axis == "devices" else (count,)
    devices = backend.first_devices(max(counts) if counts != (None,) else None)
    if hosts.count() > 1 and counts not in ((None,), (jax.device_count(),)):
        raise ConfigError(
            f"--devices and --sweep=devices: {hosts.count()} hosts are measured with all of their {jax.device_count()} "
            "devices: start fewer hosts to measure fewer devices"
        )
    return devices


def benchmark_training(
    config: Config,
    timing: TrainTiming,
    argv: Sequence[str],
    devices: Sequence[Any],
    *,
    sweep: Sweep | None = None,
    make_peak: MakePeak = MatmulPeak,
    keep: Keep = lambda report: None,
) -> dict[str, Any]:
    """The report of `tfm benchmark train`; several hosts call this together.

    Args:
      config: of the run.
      timing: what is timed, and how often.
      argv: what was typed after `tfm benchmark`.
      devices: of `devices_for`.
      sweep: along batch (rows), length (of source and target rows, with as many tokens a batch as the config has) or
        devices, with as many rows for each device as the config has for all.
      make_peak: measures the peak.
      keep: is given the report of the points so far after each of them: what comes later may fail.

    Raises InputError where the config does not fit the devices, or the corpus cannot be used.
    """
    _check_counts(timing.steps, timing.warmup)
    peaks = _Peaks(config, make_peak)
    cases = []
    for value in sweep.values if sweep else (None,):
        changed, used = config, devices
        if sweep is not None:
            changed = train_config(config, sweep.axis, value)
            used = devices[:value] if sweep.axis == "devices" else devices
        # Of all, before the first is measured; with a corpus, the vocabulary may turn out to be smaller.
        trainer_of(changed, changed.data.vocab_size, sharding.make_mesh(changed.mesh, used))
        cases.append((value, changed, used))
    points: list[dict[str, Any]] = []
    left_out: list[OutOfDeviceMemory] = []

    def so_far() -> dict[str, Any]:
        return _swept(report("train", config, argv, list(peaks.by_devices.values()), points), sweep)

    for value, changed, used in cases:
        try:
            point = time_training(changed, used, _with_folder(timing, sweep, value), peaks.of(used))
        except OutOfDeviceMemory as error:
            if sweep is None:
                raise
            left_out.append(error)
            _log.error("%s: left out", error)
            continue
        points.append(point if sweep is None else {sweep.axis: value, **point})
        _log.info("%.4g target tokens/s, MFU %.3f", point["target_tokens_per_second"], point["mfu"])
        keep(so_far())
    if not points:
        raise left_out[0]
    return so_far()


def train_config(config: Config, axis: str, value: int) -> Config:
    """The config of one point of a sweep. Raises ConfigError where it describes no run."""
    if axis == "batch":
        changed = config.with_rows(value)
        if changed.rows_per_batch != value:
            raise ConfigError(
                f"--sweep=batch: {value} rows are no multiple of training.gradient_accumulation "
                f"{config.training.gradient_accumulation}: name such numbers"
            )
        return changed
    if axis == "devices":
        return config.with_rows(value * config.rows_per_batch)
    data = dataclasses.replace(config.data, source_row_length=value, target_row_length=value)
    return dataclasses.replace(config, data=data).validate()


def benchmark_decoding(
    config: Config,
    timing: DecodeTiming,
    argv: Sequence[str],
    devices: Sequence[Any],
    *,
    beams: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    sweep: Sweep | None = None,
    make_peak: MakePeak = MatmulPeak,
    keep: Keep = lambda report: None,
) -> dict[str, Any]:
    """The report of `tfm benchmark decode`; several hosts call this together.

    Args:
      config: of the run.
      timing: what is timed, and how often.
      argv: what was typed after `tfm benchmark`.
      devices: of `devices_for`.
      beams: sizes of the beam; greedy search and the config's when None.
      batches: sentences translated at once; one, and as many as decoding.tokens_per_batch has room for, when None.
      sweep: along batch (sentences), length or devices, with as many sentences for each device.
      make_peak: measures the peak.
      keep: is given the report of the points so far after each of them: what comes later may fail.

    Raises InputError where the config does not fit the devices.
    """
    _check_counts(timing.steps, timing.warmup, timing.length, *(beams or ()), *(batches or ()))
    beams = sorted({1, config.decoding.beam_size} if beams is None else set(beams))
    check_beam(beams[-1], config.data.vocab_size, BANNED)  # before the first is measured
    peaks = _Peaks(config, make_peak)
    points: list[dict[str, Any]] = []
    left_out: list[OutOfDeviceMemory] = []

    def so_far() -> dict[str, Any]:
        made = report("decode", config, argv, list(peaks.by_devices.values()), points)
        alone = [p["search_seconds_median"] for p in points if p["sentences"] == 1 and p["beam_size"] == beams[-1]]
        if alone:
            made["latency_seconds_median"] = alone[-1]
        return _swept(made, sweep)

    for beam in beams:
        for case in _decoding_cases(config, timing.length, batches, len(devices), sweep):
            used = devices[: case.devices]
            changed = dataclasses.replace(_with_folder(timing, sweep, case.value), length=case.length)
            if changed.profile is not None:
                folder = changed.profile / f"beam-{beam}-sentences-{case.sentences}"
                changed = dataclasses.replace(changed, profile=folder)
            try:
                point = time_decoding(config, used, changed, peaks.of(used), beams=beam, sentences=case.sentences)
            except OutOfDeviceMemory as error:
                if sweep is None and not points:  # the others are larger
                    raise
                left_out.append(error)
                _log.error("%s: left out", error)
                continue
            points.append(point if sweep is None else {sweep.axis: case.value, **point})
            _log.info("beam %d: %.4g sentences/s of %d", beam, point["sentences_per_second"], case.sentences)
            keep(so_far())
    if not points:
        raise left_out[0]
    return so_far()


class _Case(NamedTuple):
    """One point of a decoding benchmark, for any beam."""

    value: int | None  # on the axis of a sweep
    sentences: int
    length: int
    devices: int


def _decoding_cases(
    config: Config, length: int, batches: Sequence[int] | None, devices: int, sweep: Sweep | None
) -> list[_Case]:
    """Without a sweep, a case for each number of sentences; in a sweep, one for each value with the most sentences."""

    def counts(length: int) -> list[int]:
        room = max(1, config.decoding.tokens_per_batch // (length + 1))
        return sorted({1, room} if batches is None else set(batches))

    if sweep is None:
        return [_Case(None, count, length, devices) for count in counts(length)]
    if sweep.axis == "batch":
        return [_Case(value, value, length, devices) for value in sweep.values]
    if sweep.axis == "length":
        return [_Case(value, counts(value)[-1], value, devices) for value in sweep.values]
    return [_Case(value, value * counts(length)[-1], length, value) for value in sweep.values]


def _swept(made: dict[str, Any], sweep: Sweep | None) -> dict[str, Any]:
    return made if sweep is None else {**made, "sweep": {"axis": sweep.axis, "values": list(sweep.values)}}


def _with_folder(timing: Any, sweep: Sweep | None, value: int | None) -> Any:
    """The timing with a folder of its own for the trace of this point."""
    if sweep is None or timing.profile is None:
        return timing
    return dataclasses.replace(timing, profile=Path(timing.profile) / f"{sweep.axis}-{value}")


def _check_counts(steps: int, warmup: int, *others: int) -> None:
    if steps < 1:
        raise InputError(f"--steps={steps}: must be at least 1")
    if warmup < 0:
        raise InputError(f"--warmup={warmup}: must be at least 0")
    if any(number < 1 for number in others):
        raise InputError(f"{min(others)}: --length, --beams and --batches must be at least 1")
