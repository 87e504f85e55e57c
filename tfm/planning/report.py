"""A plan for people: tables, and a picture of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tfm.config import InputError
from tfm.hlo.collectives import KINDS
from tfm.planning.plan import Figures, place
from tfm.sharding import LogicalAxes, is_axes
from tfm.text import aligned
from tfm.training.step import Trainer

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def table(plan: Figures) -> str:
    """Every figure of a plan, one a line, in the order and by the names of its JSON."""
    lines = [f"{place(plan)}, mesh {_mesh(plan)}"]
    if "predicted_step_seconds" in plan:
        lines.append("Times are a prediction, made by the chips' peaks; nothing was run.")
    return "\n".join(lines + _lines(plan, indent="  ")) + "\n"


def _lines(values: dict[str, Any], indent: str) -> list[str]:
    width = max((len(name) for name in values), default=0) + 2
    lines = []
    for name, value in values.items():
        words = name.replace("_", " ")
        if name in ("topology", "slices", "mesh", "device"):
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{words}", *_lines(value, indent + "    ")]
        else:
            lines.append(f"{indent}{words:<{width}}{_value(name, value)}")
    return lines


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if "seconds" in name:
        return f"{value * 1e3:,.3f} ms"
    if "per_second" in name:
        return f"{value:,.0f}"
    if "bytes" in name or name in KINDS:
        return f"{_scaled(value)}B"
    if "utilisation" in name:
        return f"{value:.1%}"
    if "over_formula" in name:
        return f"{value:.4f}"
    if name.startswith("flops"):
        return f"{_scaled(value)}FLOP"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _scaled(value: float) -> str:
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {_PREFIXES[power]}"


def _mesh(plan: Figures) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())


def sweep_table(plans: Sequence[Figures]) -> str:
    """One line a plan of a sweep: what is compared."""
    rows = [("topology", "mesh", "chips", "fits", "GiB/chip", "bound by", "tokens/s", "(sum)", "tokens/s/chip", "MFU")]
    for plan in plans:
        memory = f"{plan['memory_per_chip']['total_bytes'] / 2**30:.2f}"
        head = (place(plan), ",".join(str(size) for size in plan["mesh"].values()), str(plan["chips"]))
        if "predicted_step_seconds" not in plan:
            rows.append((*head, "no", memory, "-", "-", "-", "-", "-"))
            continue
        rate = plan["predicted_target_tokens_per_second"]
        rows.append(
            (
                *head,
                "yes" if plan["fits"] else "no",
                memory,
                plan["bound_by"],
                f"{rate:,.0f}",
                f"{plan['predicted_target_tokens_per_second_as_sum']:,.0f}",
                f"{rate / plan['chips']:,.0f}",
                f"{plan['predicted_model_flops_utilisation']:.1%}",
            )
        )
    note = "Tokens/s and MFU are predictions: were everything to overlap, and (sum) nothing."
    return f"{aligned(rows, left=len(rows[0]))}\n{note}\n"


def parameter_table(trainer: Trainer) -> str:
    """Every parameter with its shape, its logical axes, the mesh axes these map to, and its bytes on each device."""
    parameters = jax.tree_util.tree_leaves_with_path(trainer.abstract_state.parameters)
    axes = jax.tree.leaves(trainer.axes, is_leaf=is_axes)
    places = jax.tree.leaves(trainer.state_shardings.parameters)
    rows = [("parameter", "shape", "logical axes", "mesh axes", "bytes per device")]
    total = 0
    for (path, leaf), names, where in zip(parameters, axes, places, strict=True):
        size = leaf.dtype.itemsize * math.prod(where.shard_shape(leaf.shape))
        total += size
        shape = " x ".join(map(str, leaf.shape))
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        rows.append((name, shape, _names(names), _names(tuple(where.spec)), f"{size:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    return aligned(rows, left=len(rows[0])) + "\n"


def _names(axes: LogicalAxes) -> str:
    return ", ".join("-" if axis is None else "+".join([axis] if isinstance(axis, str) else axis) for axis in axes)


def draw_sweep(plans: Sequence[Figures], path: Path) -> None:
    """A picture of predicted target tokens/s against chips, a line each kind of chip and split of the model.

    What doesn't fit is left out. Raises InputError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float, float]]] = {}
    for plan in plans:
        if not plan["fits"]:
            continue
        mesh = plan["mesh"]
        label = f"{plan['chip']}, fsdp={mesh['fsdp']}, tensor={mesh['tensor']}"
        best, worst = (plan[f"predicted_target_tokens_per_second{end}"] for end in ("", "_as_sum"))
        lines.setdefault(label, []).append((plan["chips"], best, worst))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in sorted(lines.items()):
        chips, best, worst = zip(*sorted(points), strict=True)
        (line,) = axes.plot(chips, best, marker="o", label=label)
        axes.plot(chips, worst, marker="o", linestyle="--", color=line.get_color())
        axes.fill_between(chips, worst, best, alpha=0.15, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_xlabel("chips")
    axes.set_ylabel("predicted target tokens/s")
    axes.set_title("Prediction: solid if all overlaps, dashed if nothing does")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except (OSError, ValueError) as error:
        raise InputError(f"--picture={path}: cannot be written: {error}") from error
