"""A sweep as a picture: throughput and utilisation against what was swept, with the limits drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfm.config import InputError

# Okabe and Ito's colours, which can be told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#999999"
_UNITS = {
    "train": ("target_tokens_per_second", "target tokens/s"),
    "decode": ("sentences_per_second", "sentences/s"),
}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws the points of a report of `tfm benchmark --sweep` as a PNG. Raises InputError where it cannot be written.

    The limit of throughput is that of a model whose matrix products all run at the measured peak; along devices there
    is a second one, as many times the first point's rate as there are devices.
    """
    # Without pyplot: no display, no global state, nothing to close.
    from matplotlib.figure import Figure

    axis, points = report["sweep"]["axis"], report["points"]
    key, unit = _UNITS[report["benchmark"]]
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=120)
    throughput, utilisation = figure.subplots(1, 2)
    for (label, line), colour in zip(_lines(points, axis).items(), _COLOURS * len(points), strict=False):
        x = [point[axis] for point in line]
        rates = [point[key] for point in line]
        style = dict(color=colour, marker="o", markersize=4)
        throughput.plot(x, rates, label=label or "measured", **style)
        limits = [rate / point["mfu"] for rate, point in zip(rates, line, strict=True)]
        throughput.plot(x, limits, color=colour, linestyle="--", label=f"{label} at the matrix-product peak".strip())
        if axis == "devices":
            linear = [rates[0] / x[0] * devices for devices in x]
            throughput.plot(x, linear, color=_GREY, linestyle=":", label="as many times the first")
        utilisation.plot(x, [point["mfu"] for point in line], label=label or "MFU, measured peak", **style)
        published = [point["mfu_of_published_peak"] for point in line]
        if None not in published:
            utilisation.plot(x, published, color=colour, linestyle="-.", label=f"{label} of the published peak".strip())
    utilisation.axhline(1.0, color=_GREY, linestyle="--", label="limit")
    for axes, title, named in ((throughput, "Throughput", unit), (utilisation, "Model FLOPs utilisation", "share")):
        _finish(axes, title, named, axis, sorted({point[axis] for point in points}))
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _lines(points: Sequence[Mapping[str, Any]], axis: str) -> dict[str, list[Mapping[str, Any]]]:
    """Points by the line that they are on, one for each beam, from left to right."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        lines.setdefault(f"beam {point['beam_size']}" if "beam_size" in point else "", []).append(point)
    return {label: sorted(line, key=lambda point: point[axis]) for label, line in lines.items()}


def _finish(axes: Any, title: str, unit: str, axis: str, values: Sequence[int]) -> None:
    axes.set_title(title)
    axes.set_xlabel({"batch": "rows in a batch", "length": "tokens in a row"}.get(axis, axis))
    axes.set_ylabel(unit)
    if values[-1] >= 4 * values[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    heights = [y for line in axes.lines for y in line.get_ydata() if y > 0]
    if heights and max(heights) > 8 * min(heights):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
