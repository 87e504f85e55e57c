"""A benchmark's report: what was measured, and all that is needed to measure it again."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from tfm import __version__
from tfm.benchmarking.peak import MatmulPeak
from tfm.config import Config
from tfm.text import aligned, finite

FORMAT = 2
"""Of reports: another number where names or meanings of figures have changed."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "JAX_", "LIBTPU_", "MKL_", "OMP_", "XLA_")  # how the names of variables begin

# What a table shows of a point: its key, a heading, how many of the unit make one of the table's, digits.
_COLUMNS = (
    ("devices", "devices", 1, 0),
    ("beam_size", "beam", 1, 0),
    ("sentences", "sentences", 1, 0),
    ("rows_per_batch", "rows", 1, 0),
    ("source_row_length", "source", 1, 0),
    ("target_row_length", "target", 1, 0),
    ("source_length", "source", 1, 0),
    ("target_length", "target", 1, 0),
    ("compile_seconds", "compile s", 1, 1),
    ("search_seconds_median", "search ms", 1e-3, 1),
    ("first_token_seconds_median", "first token ms", 1e-3, 1),
    ("step_seconds_median", "step ms", 1e-3, 2),
    ("sentences_per_second", "sentences/s", 1, 1),
    ("target_tokens_per_second", "target tokens/s", 1, 0),
    ("model_flops_per_second", "model TFLOP/s", 1e12, 3),
    ("mfu", "MFU %", 1e-2, 1),
    ("peak_device_memory_bytes", "memory MiB", 2**20, 0),
)


def report(
    kind: str, config: Config, argv: Sequence[str], peaks: Sequence[MatmulPeak], points: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The report of `tfm benchmark KIND`: surroundings, peaks, and `points`; a single point stands at the top as well.

    Args:
      kind: "train" or "decode".
      config: as it was given; what a sweep changes stands in the points.
      argv: what was typed after `tfm benchmark`.
      peaks: one for each number of devices.
      points: the results; the last one is the one of most interest.
    """
    best = max(peaks, key=lambda peak: peak.flops)
    return {
        "benchmark": kind,
        "format": FORMAT,
        "command": shlex.join(["tfm", "benchmark", *argv]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device(best.devices[0]),
        "matmul_peaks": [{"devices": len(peak.devices), **one} for peak in peaks for one in peak.measured],
        **points[-1],
        "points": list(points),
        "config": config.to_dict(),
    }


def versions() -> dict[str, str]:
    """Of tfm, of Python, and of the packages that decide about speed, where they are installed."""
    found = {"tfm": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device(one: Any) -> dict[str, Any]:
    """What the devices are, what they are part of, and the environment variables that change what they do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device_kind": one.device_kind,
        "platform": one.platform,
        "devices_present": jax.device_count(),
        "processes": jax.process_count(),
        "host_processor": processor(),
        "host_cores": cores,
        # Without the name of the kernel's build, which says nothing about speed and may be private.
        "host_system": f"{platform.system()} {platform.machine()}",
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)},
    }


def processor() -> str:
    """The name of the CPU's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """The points as a table, a line each."""
    columns = [column for column in _COLUMNS if any(point.get(column[0]) is not None for point in points)]
    rows = [[heading for _, heading, _, _ in columns]]
    for point in points:
        rows.append([_cell(point.get(key), unit, digits) for key, _, unit, digits in columns])
    return aligned(rows)


def profile_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """Where the time of one run goes, as a table."""
    rows = [["part", "ms", "share %", "operations"]]
    for part in parts:
        rows.append(
            [
                str(part["part"]),
                _cell(part["seconds"], 1e-3, 3),
                _cell(part["share"], 1e-2, 1),
                _cell(part["operations"], 1, 0),
            ]
        )
    return aligned(rows, left=1)


def _cell(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def as_json(values: Any) -> str:
    """A report as JSON, in which what is no number is null."""
    return json.dumps(finite(values), indent=2, allow_nan=False, default=str) + "\n"
