"""Two reports of the same benchmark, side by side: the ratio of each figure, and what else was different."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfm.benchmarking.report import FORMAT
from tfm.config import InputError
from tfm.text import aligned

# A point is one that the other report has, too, where all of these are the same.
_IDENTITY = ("devices", "rows_per_batch", "source_row_length", "target_row_length")
_IDENTITY += ("beam_size", "sentences", "source_length", "target_length")
# What a point was measured with, and which its report's config doesn't have.
_SETTINGS = ("devices", "mesh", "dtype", "vocab_size", "beam_size", "sentences", "rows_per_batch", "source_row_length")
_SETTINGS += ("target_row_length", "source_length", "target_length", "lengths", "pipeline")
_SETTINGS += ("warmup_steps", "steps", "warmup_searches", "searches", "collectives")
_MEASURED = (
    "_seconds",
    "_seconds_median",
    "_seconds_p10",
    "_seconds_p90",
    "_per_second",
    "_per_device",
    "_bytes",
    "_utilisation",
    "_padding",
)
_MEASURED_NAMES = ("mfu", "mfu_of_published_peak", "matmul_peak_flops", "model_flops", "hardware_flops")


def read_report(path: Path) -> dict[str, Any]:
    """A report that `tfm benchmark --json` wrote. Raises InputError where it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from error
    points = values.get("points") if isinstance(values, dict) else None
    has_points = isinstance(points, list) and all(isinstance(point, dict) for point in points)
    if not has_points or "benchmark" not in values:
        raise InputError(f"{path}: no report of tfm benchmark: it has no `benchmark` and `points`")
    if (version := values.get("format", 1)) != FORMAT:
        raise InputError(f"{path}: a report of format {version}, and this tfm compares {FORMAT}: measure anew")
    return values


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The ratios second / first of every figure of every point that both reports have.

    Returns:
      {"differences": {name: [first, second]}, "points": [{"point": {…}, "figures": {name: {"first", "second",
      "ratio"}}}]}; differences are of the device, the versions, the config, and what the points were
      measured with.

    Raises InputError where the two are not of the same benchmark, or have no point in common.
    """
    if first["benchmark"] != second["benchmark"]:
        raise InputError(
            f"one report is of benchmark {first['benchmark']} and the other of benchmark {second['benchmark']}: "
            "compare two of the same"
        )
    others = {_identity(point): point for point in second["points"]}
    pairs = [(point, others[_identity(point)]) for point in first["points"] if _identity(point) in others]
    if not pairs and len(first["points"]) == len(second["points"]) == 1:
        pairs = [(first["points"][0], second["points"][0])]
    if not pairs:
        raise InputError(
            f"the reports have no point in common: {_points(first)} in the first, {_points(second)} in the second"
        )
    surroundings = ("device", "versions", "config")
    ours, theirs = ({name: one.get(name, {}) for name in surroundings} for one in (first, second))
    differences = dict(_differences(ours, theirs))
    for pair in pairs:
        settings = ({name: point[name] for name in _SETTINGS if name in point} for point in pair)
        differences |= {name: values for name, values in _differences(*settings) if name not in differences}
    return {
        "differences": differences,
        "points": [{"point": dict(_identity(a)), "figures": _figures(a, b)} for a, b in pairs],
    }


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as text: what differs, then a table for each point."""
    lines = [f"{name}: {a} -> {b}" for name, (a, b) in comparison["differences"].items()]
    for point in comparison["points"]:
        lines += ["", ", ".join(f"{name} {value}" for name, value in point["point"].items())]
        rows = [["", "first", "second", "ratio"]]
        for name, figure in point["figures"].items():
            ratio = "-" if figure["ratio"] is None else f"{figure['ratio']:.3f}"
            rows.append([name, f"{figure['first']:.5g}", f"{figure['second']:.5g}", ratio])
        lines.append(aligned(rows, left=1))
    return "\n".join(lines).lstrip("\n")


def _identity(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, point[name]) for name in _IDENTITY if name in point)


def _points(report: Mapping[str, Any]) -> str:
    return "; ".join(" ".join(f"{name}={value}" for name, value in _identity(point)) for point in report["points"])


def _figures(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    figures = {}
    for name, value in first.items():
        if not (name.endswith(_MEASURED) or name in _MEASURED_NAMES):
            continue
        other = second.get(name)
        if isinstance(value, (int, float)) and isinstance(other, (int, float)):
            figures[name] = {"first": value, "second": other, "ratio": other / value if value else None}
    return figures


def _differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, list[Any]]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            yield from _differences(first.get(key), second.get(key), f"{name}.{key}" if name else key)
    elif first != second:
        yield name, [first, second]
