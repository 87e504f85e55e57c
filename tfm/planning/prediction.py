"""A step's time out of what it computes, reads and says: a prediction, made without the chips."""

from __future__ import annotations

import dataclasses

from tfm.chips import Chip

# Products of bfloat16 that a TPU makes one of float32 out of, at the precision that the model asks for there: each
# operand as the sum of three, without the three smallest of the nine products.
_FLOAT32_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a step, were each part of it at the chip's peak.

    The truth is, at best, the largest of them, where the chip does everything at once, and nearer to the sum where
    one waits for the other. No program is at the peak all the time: a measured step takes longer than the first.
    """

    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    network_seconds: float = 0.0  # between slices

    @property
    def largest_seconds(self) -> float:
        """Seconds of a step whose parts all go on at the same time."""
        return max(dataclasses.astuple(self))

    @property
    def sum_seconds(self) -> float:
        """Seconds of a step whose parts come one after the other."""
        return sum(dataclasses.astuple(self))

    @property
    def bound_by(self) -> str:
        """The part that takes longest: "compute", "memory", "interconnect" or "network"."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name]).removesuffix("_seconds")


def with_peak_of(chip: Chip, dtype: str) -> Chip:
    """A TPU with the peak of matrix products that it has in a dtype, "bfloat16" or "float32"."""
    return dataclasses.replace(chip, peak_flops=chip.peak_flops / (_FLOAT32_PASSES if dtype == "float32" else 1))


def predict(
    chip: Chip, flops: float, main_memory_bytes: float, interconnect_seconds: float, network_seconds: float = 0.0
) -> Prediction:
    """The prediction for a program's FLOPs and bytes on one chip, by the chip's peaks in `tfm.chips`."""
    memory_seconds = main_memory_bytes / chip.memory_bandwidth
    return Prediction(flops / chip.peak_flops, memory_seconds, interconnect_seconds, network_seconds)


def utilisation(formula_flops: float, seconds: float, chip: Chip) -> float:
    """MFU: the share of a chip's peak that the formula's FLOPs, on one chip, make up."""
    return formula_flops / seconds / chip.peak_flops
