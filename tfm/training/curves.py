"""The learning curves of a run as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which can be told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def draw_curves(events: Iterable[Mapping[str, Any]], picture: Path) -> None:
    """Draws the learning curves of a run's events as a PNG, which replaces the old one when it is whole.

    Raises OSError.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state, nothing to close

    curves: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for event in events:
        for name, value in event.items():
            if name not in ("step", "kind") and value is not None:
                steps, values = curves.setdefault((event["kind"], name), ([], []))
                steps.append(event["step"])
                values.append(value)

    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=120)
    loss, score, rate = figure.subplots(1, 3)
    _line(loss, curves, "train", "loss", _GREY, "training, smoothed labels", linewidth=1)
    _line(loss, curves, "train", "nll", _BLUE, "training", linewidth=1)
    _line(loss, curves, "validation", "nll", _ORANGE, "validation", marker="o")
    _finish(loss, "Loss", "nats per target token")
    _line(score, curves, "validation", "bleu", _BLUE, "BLEU", marker="o")
    _line(score, curves, "validation", "chrf", _GREEN, "chrF", marker="s", linestyle="--")
    _finish(score, "Validation translations", "score, 0 to 100")
    score.set_ylim(bottom=0)
    _line(rate, curves, "train", "learning_rate", _BLUE, "learning rate")
    _finish(rate, "Learning rate", "per update")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))

    unfinished = picture.with_name(f".{picture.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png")
        os.replace(unfinished, picture)
    finally:
        unfinished.unlink(missing_ok=True)


def _line(axes: Any, curves: Mapping[Any, Any], kind: str, name: str, color: str, label: str, **style: Any) -> None:
    if (kind, name) in curves:
        axes.plot(*curves[kind, name], color=color, label=label, markersize=4, **style)


def _finish(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step (update)")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color=_GREY)
