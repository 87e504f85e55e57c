"""What the chips of a compiled program say to one another: counted in its text, and by formula.

Bytes are those of the whole array that a group of chips handles together, as one of them sees it: what is summed
(all-reduce, reduce-scatter) before it is cut, what is gathered (all-gather) after it is whole, what each chip sends
(all-to-all, collective-permute).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tfm import sharding
from tfm.planning.hlo import Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


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

    An asynchronous one counts where it starts. What a TPU fuses, an all-reduce of which each chip keeps a piece, is a
    reduce-scatter. Groups of a single chip say nothing, and are left out.
    """
    found = []
    for computation, instruction, times, _ in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        group = _group(kind, instruction.attributes, devices)
        if len(group) < 2:
            continue
        size = float(computation.operand_bytes(instruction))
        if kind == "all-gather":
            size *= len(group)
        if kind == "all-reduce" and "reduce-scatter" in computation.name.replace(
            "all-reduce-scatter", "reduce-scatter"
        ):
            kind = "reduce-scatter"
        found.append(Collective(kind, times, size, group))
    return found


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
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is None:  # `replica_groups={}`: all together
        return tuple(range(devices))
    shape, reshaped = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    ids = np.arange(math.prod(reshaped)).reshape(reshaped)
    if iota[3]:
        ids = ids.transpose([int(axis) for axis in iota[3].split(",")])
    return tuple(int(device) for device in ids.reshape(shape)[0])


def expected_traffic(mesh: Mesh, parameters: Any, shardings: Any, micro_batches: int, dtype: Any) -> dict[str, float]:
    """Bytes a step by kind, by formula, where only the batch axes split anything; scalars, such as the loss, left out.

    The gradient of a weight has the dtype of the matrix product that it comes from; those of tables, biases and norms
    are float32. They are summed over the batch once a micro-batch. A parameter that is whole on every device has its
    gradient all-reduced. One that is split (fsdp) is gathered in the compute dtype for the forward pass and again for
    the backward pass, and its gradient is summed and cut by a reduce-scatter, and what is left of it is all-reduced
    over the other batch axis.

    Raises:
      ValueError: a mesh that splits more than the batch.
    """
    shards = sharding.batch_shards(mesh)
    if shards != mesh.size:
        raise ValueError("the formula is one of the batch axes alone")
    found = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter"), 0.0)
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(shardings), strict=True
    ):
        is_weight = getattr(path[-1], "key", None) == "kernel"
        size = leaf.size * (jnp.dtype(dtype).itemsize if is_weight else 4.0) * micro_batches
        parts = leaf.size // math.prod(where.shard_shape(leaf.shape))
        if parts > 1:
            found["all-gather"] += 2.0 * size
            found["reduce-scatter"] += size
        if shards > parts:
            found["all-reduce"] += size / parts
    return {kind: size for kind, size in found.items() if size}
