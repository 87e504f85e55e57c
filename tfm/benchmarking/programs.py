"""Compiled programs: the seconds of each stage of compilation, of runs with the device waited for, and their memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tfm import device_memory
from tfm.device_memory import OutOfDeviceMemory
from tfm.hlo.collectives import collectives_of, traffic
from tfm.hlo.program import Program

_log = logging.getLogger(__name__)


def compiled_in_stages(function: Any, *arguments: Any) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """A jitted function compiled ahead of time for arguments like these, and the seconds that each stage took."""
    start = time.perf_counter()
    traced = function.trace(*arguments)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return compiled, stage_seconds(after_trace - start, after_lower - after_trace, end - after_lower)


def stage_seconds(trace: float, lower: float, compile: float) -> dict[str, float]:
    """The three stages as a report has them; `compile_seconds` is all of them together."""
    return {
        "compile_seconds": trace + lower + compile,
        "compile_trace_seconds": trace,
        "compile_lower_seconds": lower,
        "compile_backend_seconds": compile,
    }


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, its results on the device waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def spread(name: str, seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of times, as `{name}_seconds_median` and so on."""
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    return {f"{name}_seconds_median": median, f"{name}_seconds_p10": p10, f"{name}_seconds_p90": p90}


def lowered_flops(lowered: jax.stages.Lowered) -> float | None:
    """FLOPs that XLA counts in a program before it optimises it, over all devices; None where it cannot.

    XLA counts the body of a loop once, however often it runs: the program should have none.
    """
    try:
        analysis = lowered.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    flops = (analysis or {}).get("flops")
    return None if flops is None or flops < 0 else float(flops)


def memory(compiled: jax.stages.Compiled, devices: list[Any]) -> dict[str, Any]:
    """Peak bytes on the fullest device that this host has, and who says so.

    "device": what its allocator has seen at most since the process began. "program": where the device does not count
    (a CPU), the arguments, results and temporary buffers of the compiled program, those that share memory once.
    """
    analysis = compiled.memory_analysis()
    program = None
    if analysis is not None:
        program = (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            + analysis.temp_size_in_bytes
            - analysis.alias_size_in_bytes
        )
    statistics = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    peaks = [each["peak_bytes_in_use"] for each in statistics if "peak_bytes_in_use" in each]
    return {
        "peak_device_memory_bytes": max(peaks) if peaks else program,
        "peak_device_memory_source": "device" if peaks else "program",
        "program_memory_bytes": program,
    }


def refuse_larger(compiled: jax.stages.Compiled, what: str, device: Any) -> None:
    """Raises OutOfDeviceMemory where a compiled program is larger than its devices, before it is tried."""
    device_memory.refuse_larger(what, memory(compiled, [])["program_memory_bytes"], device)


def fits(lowered: jax.stages.Lowered, device: Any) -> bool:
    """Whether a program can be compiled, and has room on its devices."""
    try:
        with device_memory.explained("a program"):
            refuse_larger(lowered.compile(), "a program", device)
    except OutOfDeviceMemory:
        return False
    return True


def largest_power_of_two(below: int, fits: Callable[[int], bool]) -> int | None:
    """The largest power of two below a number that fits; None where not even 1 does."""
    powers = (2**power for power in reversed(range((below - 1).bit_length())))
    return next(filter(fits, powers), None)


def collectives(compiled: jax.stages.Compiled, devices: int) -> dict[str, int] | None:
    """Collectives of a program among so many devices, by kind, {"all-reduce": 3}; those in a loop as often as it turns.

    Once where the program doesn't say how often, as a search's doesn't. None, and a warning, where the compiler writes
    them in a form that isn't known.
    """
    try:
        found = traffic(collectives_of(Program(compiled.as_text()), devices))
    except ValueError as error:
        _log.warning("collectives are not counted: %s", error)
        return None
    return {kind: each.count for kind, each in found.items()}
