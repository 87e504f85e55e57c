"""Where the time goes: a trace of a compiled program, and its operations summed up by the part of the model they serve.

The trace itself can be looked at with TensorBoard or Perfetto. The table is read off it: a profiler names the operation
of the compiled program, and the program says which part of the model (`op_name`, the path of JAX's transformations and
Flax's modules) an operation was made of.
"""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from tfm import hosts
from tfm.config import InputError
from tfm.hlo.collectives import KINDS as COLLECTIVES

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Their events last as long as those of what they hold, which are in the trace by themselves.
_CONTAINERS = {"while", "conditional", "call"}
# Of an op_name: a module has a plain name, its method comes after a dot, and transformations have parentheses.
_MODULE = re.compile(r"\w+")
# What JAX calls the alternatives of a conditional, also of one between platforms.
_BRANCH = re.compile(r"branch_\d+_fun")
# The scan over layers, whose modules all have the same name, and the control flow that JAX puts in.
_NO_PART = {
    "Transformer",
    "layers",
    "while",
    "body",
    "cond",
    "closed_call",
    "eval_jaxpr",
    "shard_map",
    "checkpoint",
    "rematted_computation",
}
_DEPTH = 2  # decoder/cross_attention
_GPU = "/device:GPU"  # how the names of planes of GPUs begin
_ROWS = 24


def check_profile(directory: Path) -> None:
    """Raises InputError where a trace cannot be written to a directory, which is made if it isn't there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"--profile={directory}: cannot be written: {error.strerror}") from error


def profiled(
    directory: Path, compiled: jax.stages.Compiled, run: Callable[[], Any], count: int, elsewhere: str
) -> list[dict[str, float | str]]:
    """Traces `count` runs of a compiled program into `directory`; the table of `time_by_part`.

    Of several hosts, which all run it, the first alone is traced; the others have an empty table. Raises InputError
    where nothing can be written there.
    """
    if not hosts.is_first():
        for _ in range(count):
            jax.block_until_ready(run())
        return []
    check_profile(directory)
    before = set(directory.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(directory)):
        for _ in range(count):
            jax.block_until_ready(run())
    traces = sorted(set(directory.rglob("*.xplane.pb")) - before)
    if not traces:
        raise InputError(f"--profile={directory}: the profiler wrote no trace there; name an empty directory")
    return time_by_part(_durations(traces[-1]), compiled.as_text(), count, elsewhere)


def time_by_part(
    durations: Mapping[str, tuple[float, int]], program: str, runs: int, elsewhere: str
) -> list[dict[str, float | str]]:
    """Operations summed up by part of the model and direction, the longest first; the last row is all others.

    Args:
      durations: seconds and events of each name in the trace; those that are no operation of the program are left out.
      program: text of the compiled program.
      runs: that the trace holds; times are those of one.
      elsewhere: what is said of operations outside the model.
    """
    parts = _parts_of(program, elsewhere)
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
        table.append({"part": "all others", "seconds": others, "share": others / total, "operations": number / runs})
    return table


def _durations(trace: Path) -> dict[str, tuple[float, int]]:
    """Seconds and number of the events of a trace by name, those of a device's operations by the operation's."""
    found: dict[str, tuple[float, int]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        has_kernels = plane.name.startswith(_GPU)
        for line in plane.lines:
            for event in line.events:
                # Not asked for in vain: reading those of a CPU can end the process, in jaxlib 0.11.
                name = operation_of(plane.name, event.name, event.stats if has_kernels else ())
                seconds, number = found.get(name, (0.0, 0))
                found[name] = (seconds + event.duration_ns / 1e9, number + 1)
    return found


def operation_of(plane: str, event: str, stats: Iterable[tuple[str, Any]]) -> str:
    """The operation of the compiled program that an event of a trace is one of, or is a part of.

    A GPU's event is a kernel, which says of which operation; a CPU's is the operation, and a TPU's may be the whole
    instruction.
    """
    if plane.startswith(_GPU):
        event = str(next((value for key, value in stats if key == "hlo_op"), event))
    return event.removeprefix("%").partition(" = ")[0]


def _parts_of(program: str, elsewhere: str) -> dict[str, str]:
    """The part of the model that each operation of a compiled program serves, but for those that hold others."""
    parts = {}
    for line in program.split("\n"):
        instruction = _INSTRUCTION.match(line)
        if instruction is None or instruction[2] in _CONTAINERS:
            continue
        name, opcode = instruction.groups()
        op_name = _OP_NAME.search(line)
        if (kind := opcode.removesuffix("-start").removesuffix("-done")) in COLLECTIVES:
            parts[name] = f"{kind}, waiting included"  # for many parts at once, and as long as other devices take
        else:
            parts[name] = part_of(op_name[1], elsewhere) if op_name else f"{opcode}, of no known part"
    return parts


def part_of(op_name: str, elsewhere: str = "update") -> str:
    """`jit(_train_step)/transpose(jvp(Transformer))/…/decoder/…/cross_attention/query/dot_general` as
    `decoder/cross_attention, backward`; what stands in no module is the loss where it has a gradient, or else
    `elsewhere`.
    """
    steps = [step.partition(".")[0] for step in op_name.split("/")[:-1]]
    named = (step for step in steps if _MODULE.fullmatch(step) and not _BRANCH.fullmatch(step))
    modules = dict.fromkeys(step for step in named if step not in _NO_PART)
    part = "/".join(list(modules)[:_DEPTH]) or ("loss" if "jvp(" in op_name else elsewhere)
    return f"{part}, backward" if "transpose(" in op_name else part
