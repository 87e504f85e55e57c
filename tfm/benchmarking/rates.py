"""Times and FLOPs into what one wants to know: rates, for all devices and for each, and shares of the peaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfm.chips import chip_of


def per_second(amounts: Mapping[str, float], seconds: float, devices: int) -> dict[str, float]:
    """{"target_tokens": 100} in so many seconds, as `target_tokens_per_second` and `…_per_second_per_device`."""
    rates = {f"{name}_per_second": amount / seconds for name, amount in amounts.items()}
    return rates | {f"{name}_per_device": rate / devices for name, rate in rates.items()}


def utilisation(
    model_flops: float,
    hardware_flops: float | None,
    seconds: float,
    *,
    devices: int,
    device_kind: str,
    dtype: str,
    matmul_peak_flops: float,
) -> dict[str, Any]:
    """FLOPs of a program that ran for so many seconds on all devices together, and their share of the peaks.

    Args:
      model_flops: by formula (`tfm.model.flops`).
      hardware_flops: as XLA counts them; None where it doesn't.
      seconds: of one run.
      devices: how many.
      device_kind: JAX's name of the device, by which the maker's peak is looked up.
      dtype: of the matrix products; the maker's peak is that of bfloat16, and says nothing about float32.
      matmul_peak_flops: what was measured for all devices together, FLOP/s.

    Returns:
      `mfu` and `hardware_flops_utilisation` against the measured peak, `mfu_of_published_peak` against the maker's;
      None for what isn't known.
    """
    chip = chip_of(device_kind) if dtype == "bfloat16" else None
    published = None if chip is None else chip.peak_flops * devices
    return {
        "model_flops": model_flops,
        "hardware_flops": hardware_flops,
        **per_second({"model_flops": model_flops}, seconds, devices),
        "mfu": model_flops / seconds / matmul_peak_flops,
        "mfu_of_published_peak": None if published is None else model_flops / seconds / published,
        "hardware_flops_utilisation": (
            None if hardware_flops is None else hardware_flops / seconds / matmul_peak_flops
        ),
        "matmul_peak_flops": matmul_peak_flops,
        "published_peak_flops": published,
    }
