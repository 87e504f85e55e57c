"""What the devices of a compiled program say to one another, counted in its text.

Bytes are those of the whole array that a group of chips handles together, as one of them sees it: what is summed
(all-reduce, reduce-scatter) before it is cut, what is gathered (all-gather) after it is whole, what each chip sends
(all-to-all, collective-permute).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from tfm.hlo.program import Program

BETWEEN_SLICES = "all-reduce-between-slices"
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", BETWEEN_SLICES)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a program, with what it does in a step."""

    kind: str
    count: int  # executions
    bytes: float  # of one execution
    group: tuple[int, ...]  # devices that take part together, as positions in the mesh; one group stands for all


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind in a step, seen from one chip."""

    count: int
    bytes: float


def collectives_of(program: Program, devices: int) -> list[Collective]:
    """The collectives among `devices` of a program, each once, with how often it is executed.

    An asynchronous one counts where it starts; on a TPU, it may then go on within fusions of other work. What a TPU
    fuses, an all-reduce of which each chip keeps a piece, is a reduce-scatter. A sum over several slices comes in three
    parts: a reduce-scatter and an all-gather within each, and between them what each chip sends to its like in the
    others. Groups of a single chip say nothing, and are left out.

    Raises:
      ValueError: groups, or what is said between slices, in a form that isn't known.
    """
    found = []
    continued = _continued(program)
    for computation, instruction, times, _ in program.executed():
        if instruction.opcode == "send" and "megascale" in instruction.attributes:
            size = float(computation.operand_bytes(instruction))
            found.append(Collective(BETWEEN_SLICES, times, size, _one_of_each_slice(instruction.attributes, devices)))
            continue
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or computation.name in continued:
            continue
        group = _group(kind, instruction.attributes, devices)
        if len(group) < 2:
            continue
        size = float(computation.operand_bytes(instruction))
        if kind == "all-gather":
            size *= len(group)
        if kind == "all-reduce" and "reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        found.append(Collective(kind, times, size, group))
    return found


def _continued(program: Program) -> set[str]:
    """Fusions that repeat a collective which an `async-collective-start` began: to work on beside it, or to end it."""
    ends = {
        program.fused(instruction).name
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion" and instruction.name.startswith("async-collective-done")
    }
    return ends | {name for name in program.computations if name.startswith("async_collective_fusion")}


def traffic(collectives: Sequence[Collective]) -> dict[str, Traffic]:
    """Count and bytes a step by kind; kinds that don't occur are left out."""
    by_kind = {}
    for kind in KINDS:
        own = [c for c in collectives if c.kind == kind]
        if own:
            by_kind[kind] = Traffic(sum(c.count for c in own), sum(c.count * c.bytes for c in own))
    return by_kind


def _group(kind: str, attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that an instruction names."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes.partition("source_target_pairs=")[2])
        moves = [(int(a), int(b)) for a, b in pairs if a != b]
        return moves[0] if moves else ()
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(device) for device in listed[1].split(",") if device)
    if "replica_groups=mesh[" in attributes:
        return _group_on_mesh(attributes)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is not None:
        return tuple(_iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist())
    if "replica_groups={}" not in attributes and "replica_groups=" in attributes:
        raise ValueError(f"unknown form of groups in {attributes}")
    return tuple(range(devices))  # all together


def _one_of_each_slice(attributes: str, devices: int) -> tuple[int, ...]:
    """The first chips of all slices: `_xla_megascale_target="{1,2}x{0:3}"` is two slices of four."""
    slices = re.search(r'megascale_target="\{([\d,]+)\}x', attributes)
    if slices is None or 'megascale_transfer_type="ALL_REDUCE"' not in attributes:
        raise ValueError(f"unknown form of what slices say to one another in {attributes}")
    return tuple(range(0, devices, devices // len(_numbers(slices[1]))))


def _group_on_mesh(attributes: str) -> tuple[int, ...]:
    """Groups along named axes: `mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0'}`.

    `'axis_0':(2)4` is a part of an axis: four places, of which each is as many apart as what is left after 2 and 4.
    """
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    )
    if found is None:
        raise ValueError(f"unknown form of groups in {attributes}")
    along = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4])}
    shape, index = [], []
    for name, text in re.findall(r"'([^']+)'=(\d+)", found[1]):
        before, size = along.get(name, ("1", "1"))
        parts = [int(before or 1), int(size or text)]
        shape += [*parts, int(text) // math.prod(parts)]
        index += [0, slice(None), 0]
    ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(shape))
    return tuple(ids.reshape(shape)[tuple(index)].ravel().tolist())


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Device numbers `[4,4]T(1,0)`: counted up in that shape, then transposed."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
