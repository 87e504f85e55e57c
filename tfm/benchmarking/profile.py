"""Where the time goes: a trace of a compiled program, and its operations summed up by the part of the model they serve.

The trace itself can be looked at with TensorBoard or Perfetto. The table is read off it: a profiler names the operation
of the compiled program, and the program says which part of the model (`op_name`, the path of JAX's transformations and
Flax's modules) an operation was made of.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from tfm.config import InputError

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (?:\([^=]*?\)|\S+) ([\w-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Their events last as long as those of what they hold, which are in the trace by themselves.
_CONTAINERS = {"while", "conditional", "call"}
_TRANSFORMATION = re.compile(r"^(?:jit|jvp|transpose|vmap|shard_map|checkpoint|rematted_computation)\b.*$")
_PARTS = 3  # of a module path
_ROWS = 24


def profiled(
    directory: Path, compiled: jax.stages.Compiled, run: Callable[[], Any], count: int
) -> list[dict[str, float | str]]:
    """Traces `count` runs of a compiled program into `directory`; the table of `time_by_part` of one run.

    Raises InputError where nothing can be written there.
    """
    before = set(directory.rglob("*.xplane.pb")) if directory.is_dir() else set()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--profile={directory}: cannot be written: {error.strerror}") from error
    with jax.profiler.trace(str(directory)):
        for _ in range(count):
            jax.block_until_ready(run())
    traces = sorted(set(directory.rglob("*.xplane.pb")) - before)
    if not traces:
        raise InputError(f"--profile={directory}: the profiler wrote no trace there; name an empty directory")
    return time_by_part(_durations(traces[-1]), compiled.as_text(), count)


def time_by_part(
    durations: Mapping[str, tuple[float, int]], program: str, runs: int
) -> list[dict[str, float | str]]:
    """Operations summed up by part of the model and direction, the longest first; the last row is all others.

    Args:
      durations: seconds and events of each name in the trace; those that are no operation of the program are left out.
      program: text of the compiled program.
      runs: that the trace holds; times are those of one.
    """
    parts = _parts_of(program)
    seconds: dict[str, float] = collections.Counter()
    events: dict[str, int] = collections.Counter()
    for name, (duration, number) in durations.items():
        if name in parts:
            seconds[parts[name]] += duration / runs
            events[parts[name]] += number
    total = sum(seconds.values())
    ordered = sorted(seconds, key=seconds.__getitem__, reverse=True)
    table = [
        {"part": part, "seconds": seconds[part], "share": seconds[part] / total, "operations": events[part] / runs}
        for part in ordered[:_ROWS]
    ]
    if rest := ordered[_ROWS:]:
        others = sum(seconds[part] for part in rest)
        number = sum(events[part] for part in rest)
        table.append(
            {"part": "all others", "seconds": others, "share": others / total, "operations": number / runs}
        )
    return table


def _durations(trace: Path) -> dict[str, tuple[float, int]]:
    """Seconds and number of the events of a trace by name, those of a device's operations by the operation's."""
    found: dict[str, tuple[float, int]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                # A GPU's event is a kernel, which says of which operation; a TPU's and a CPU's is the operation.
                name = event.name
                if plane.name.startswith("/device:GPU"):
                    name = str(next((value for key, value in event.stats if key == "hlo_op"), name))
                seconds, number = found.get(name, (0.0, 0))
                found[name] = (seconds + event.duration_ns / 1e9, number + 1)
    return found


def _parts_of(program: str) -> dict[str, str]:
    """The part of the model that each operation of a compiled program serves, but for those that hold others."""
    parts = {}
    for line in program.split("\n"):
        instruction = _INSTRUCTION.match(line)
        if instruction and instruction[2] not in _CONTAINERS:
            op_name = _OP_NAME.search(line)
            parts[instruction[1]] = part_of(op_name[1]) if op_name else f"({instruction[2]})"
    return parts


def part_of(op_name: str) -> str:
    """`jit(_train_step)/transpose(jvp(Transformer))/decoder/layers/…/dot_general` as `decoder/layers/…, backward`."""
    path = op_name.split("/")
    backward = any(step.startswith("transpose(") for step in path)
    names = [step for step in path[:-1] if not _TRANSFORMATION.match(step) and step not in ("while", "body", "closed_call")]
    scopes = [name.rpartition(".")[0] or name for name in names]
    kept = "/".join(dict.fromkeys(scopes[:_PARTS])) or path[-1]
    return f"{kept}, backward" if backward else kept
