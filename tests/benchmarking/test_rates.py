"""Rates and shares of the peaks, by hand."""

import pytest

from tfm.benchmarking.rates import per_second, utilisation


def test_rates_of_all_devices_and_of_each():
    assert per_second({"target_tokens": 100}, 0.5, 4) == {
        "target_tokens_per_second": 200,
        "target_tokens_per_second_per_device": 50,
    }


@pytest.mark.parametrize(
    ("kind", "dtype", "published"),
    [("NVIDIA H200", "bfloat16", 2 * 989e12), ("NVIDIA H200", "float32", None), ("cpu", "bfloat16", None)],
)
def test_shares_of_both_peaks(kind, dtype, published):
    found = utilisation(4e14, 5e14, 0.5, devices=2, device_kind=kind, dtype=dtype, matmul_peak_flops=1.6e15)
    assert found["mfu"] == pytest.approx(0.5)
    assert found["hardware_flops_utilisation"] == pytest.approx(0.625)
    assert found["model_flops_per_second_per_device"] == pytest.approx(4e14)
    assert found["published_peak_flops"] == published
    assert found["mfu_of_published_peak"] == (None if published is None else pytest.approx(8e14 / published))


def test_what_xla_does_not_count_stays_unknown():
    found = utilisation(1.0, None, 1.0, devices=1, device_kind="cpu", dtype="float32", matmul_peak_flops=2.0)
    assert found["hardware_flops"] is found["hardware_flops_utilisation"] is None
