"""Slices of TPUs by name, the devices that the compiler sees of them, and the time of a collective on their links."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from tfm.chips import TPUS, Chip
from tfm.config import InputError
from tfm.hlo.collectives import BETWEEN_SLICES, Collective
from tfm.text import near

# Of those that Google Cloud offers ("TPU v4", "v5e", "v5p" and "v6e" architecture pages), the ones of whole hosts that
# libtpu knows, with the largest.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_LARGEST = {"v4": ("12x16x16",), "v5p": ("16x16x16", "16x16x24")}
TOPOLOGIES = {"v4": _CUBES + _LARGEST["v4"], "v5e": _FLAT, "v5p": _CUBES + _LARGEST["v5p"], "v6e": _FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several alike that a network joins: its name, its chip, and the sizes of its grid."""

    name: str  # "v5e:16x16"
    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.grid)

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    def is_ring(self, axis: int) -> bool:
        """Whether the ends of an axis are joined. Switches do it in slices of three axes, for whole cubes alone."""
        shortest = min(self.grid) if len(self.grid) == 3 else self.grid[axis]
        return 0 < self.chip.wraps_from <= shortest


def topology_of(name: str) -> Topology:
    """The slice of that name. Raises InputError with those that are known."""
    kind, _, shape = name.partition(":")
    if kind not in TOPOLOGIES or shape not in TOPOLOGIES[kind]:
        known = [f"{kind}:{shape}" for kind, shapes in TOPOLOGIES.items() for shape in shapes]
        hint = near(name, known, otherwise=";")
        raise InputError(f"--topology={name}: no such TPU topology{hint} there are {', '.join(known)}")
    return Topology(name, TPUS[kind], tuple(int(size) for size in shape.split("x")))


def devices_of(topology: Topology) -> list[Any]:
    """The devices of the slices as the TPU compiler describes them: programs compile for them, but do not run.

    Raises InputError where the compiler, libtpu, is not installed or does not know the slice.
    """
    if find_spec("libtpu") is None:
        raise InputError(
            f"--topology={topology.name}: compiling for a TPU takes libtpu, which is not installed: "
            "pip install -r requirements-tpu.txt (no TPU is needed)"
        )
    from jax.experimental import topologies

    _keep_off_the_network()
    # A v4 has two cores, which otherwise would be two devices; later chips are one device in any case.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:  # JAX's own errors are RuntimeErrors
        reason = " ".join(str(error).split())
        if "lockfile" in reason:
            raise InputError(
                f"--topology={topology.name}: another process is using libtpu: wait for it, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1 where both only compile"
            ) from error
        raise InputError(f"--topology={topology.name}: the installed libtpu does not know it: {reason}") from error
    return list(devices)


def _keep_off_the_network() -> None:
    """Without these, libtpu asks the metadata server of a cloud machine which TPU it is on, and complains at length."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any that it knows: the topology is named when it is asked for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used that another program could want
    }.items():
        os.environ.setdefault(name, value)


def collective_seconds(collective: Collective, topology: Topology, coordinates: Sequence[Sequence[int]]) -> float:
    """Time of all executions of a collective in a step, by the bandwidth of the links alone.

    A ring algorithm along each axis of the grid that the group spans, in both directions, each axis at work on its own
    share of the array (Austin et al., 2025, "How to Scale Your Model", chapters 2 and 3): an all-gather or
    reduce-scatter of V bytes among n chips takes V (n - 1) / n over the axes' bandwidth, an all-reduce twice that, an
    all-to-all, whose data need only go a part of the way, a quarter of it. An axis that is no ring, being shorter than
    the chip's `wraps_from`, has half the bandwidth, since its last chip is reached by one link. Chips of a group that
    are no neighbours share the links between them with the other groups. A permutation goes over one link. What goes
    between slices does so at the chip's share of its host's network. Left out is the time of a hop (about a
    microsecond, and more between slices).

    Args:
      collective: of a compiled program.
      topology: the slice it runs on.
      coordinates: place in the grid of each device of the mesh, in the mesh's order.
    """
    chip, n = topology.chip, len(collective.group)
    if collective.kind == BETWEEN_SLICES:
        return collective.count * 2.0 * collective.bytes * (n - 1) / n / chip.network_bandwidth
    if collective.kind == "collective-permute":
        return collective.count * collective.bytes / chip.link_bandwidth
    places = [coordinates[device] for device in collective.group]
    bandwidth = 0.0
    for axis, length in enumerate(topology.grid):
        values = {place[axis] for place in places}
        if len(values) == 1:
            continue
        is_ring = len(values) == length and topology.is_ring(axis)
        span = length if is_ring else max(values) - min(values) + 1
        bandwidth += chip.link_bandwidth * (2 if is_ring else 1) * len(values) / span
    if not bandwidth:
        raise ValueError(f"{collective.kind} among chips {collective.group}, which are all in one place")
    moved = collective.bytes * (n - 1) / n * {"all-reduce": 2.0, "all-to-all": n / 4.0}.get(collective.kind, 1.0)
    return collective.count * moved / bandwidth


def coordinates_of(devices: Sequence[Any], topology: Topology) -> list[tuple[int, ...]]:
    """Place in the grid of each device."""
    return [tuple(device.coords[: len(topology.grid)]) for device in devices]


def no_accelerator_is_looked_for() -> None:
    """Has JAX use CPUs alone: with libtpu installed, it would otherwise look for a TPU, and wait for one in use."""
    jax.config.update("jax_platforms", "cpu")
