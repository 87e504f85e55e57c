"""What an accelerator's maker says it can do, in one place: peaks, memory, and bandwidths of one chip.

TPU figures are those of Google Cloud's "TPU v4", "v5e", "v5p" and "v6e" system architecture pages; links between chips
are those of "How to Scale Your Model" (Austin et al., 2025, chapter 2), one direction of one link. The network between
slices is a chip's share: of v5p as its page has it, of v5e and v6e the pod's by its chips, of v4 a quarter of the 25
GB/s of a host that the book takes for typical. A TPU's memory is what its compiler has for programs, by its own word.
GPU figures are NVIDIA's data sheets, dense matrix products without sparsity.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; a GPU has no links of a torus, and is joined to others by `link_bandwidth` as a whole."""

    name: str
    peak_flops: float  # bfloat16 matrix products, FLOP/s
    memory: float  # bytes that a program can have
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s in one direction of one link
    wraps_from: int = 0  # chips along an axis from which on its ends are joined to a ring; 0 is never
    network_bandwidth: float = 0.0  # bytes/s between slices, in one direction, of a chip's share of its host


GIB = 2**30

TPUS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1.2e12, 4.5e10, wraps_from=4, network_bandwidth=6.25e9),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 8.1e11, 4.5e10, wraps_from=16, network_bandwidth=3.125e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2.765e12, 9.0e10, wraps_from=4, network_bandwidth=6.25e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1.64e12, 9.0e10, wraps_from=16, network_bandwidth=1.25e10),
}
GPUS = {
    "A100": Chip("NVIDIA A100", 312e12, 80 * GIB, 2.039e12, 3.0e11),
    "L4": Chip("NVIDIA L4", 121e12, 24 * GIB, 3.0e11, 3.2e10),
    "H100": Chip("NVIDIA H100", 989e12, 80 * GIB, 3.35e12, 4.5e11),
    "H100 PCIe": Chip("NVIDIA H100 PCIe", 756e12, 80 * GIB, 2.0e12, 3.0e11),
    "H100 NVL": Chip("NVIDIA H100 NVL", 835e12, 94 * GIB, 3.9e12, 3.0e11),
    "H200 NVL": Chip("NVIDIA H200 NVL", 835e12, 141 * GIB, 4.8e12, 4.5e11),
    "H200": Chip("NVIDIA H200", 989e12, 141 * GIB, 4.8e12, 4.5e11),
    "B200": Chip("NVIDIA B200", 2250e12, 180 * GIB, 8.0e12, 9.0e11),
}

# How JAX names what it finds: `device.device_kind`, of which whole words are looked for, the most of them first.
_KINDS = {
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v5p": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v6e": TPUS["v6e"],
    **GPUS,
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that isn't in the table, such as a CPU, and for a part of one (MIG)."""
    if re.search(r"\bMIG\b", device_kind):
        return None
    found = [name for name in _KINDS if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE)]
    return _KINDS[max(found, key=len)] if found else None
