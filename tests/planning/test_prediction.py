"""The prediction, by numbers that can be checked by hand."""

import pytest

from tfm.chips import Chip
from tfm.planning.prediction import predict, utilisation, with_peak_of

CHIP = Chip("chip", peak_flops=100.0, memory=1000.0, memory_bandwidth=10.0, link_bandwidth=1.0)


def test_the_largest_and_the_sum():
    prediction = predict(CHIP, flops=500.0, main_memory_bytes=20.0, interconnect_seconds=1.0)
    assert (prediction.compute_seconds, prediction.memory_seconds, prediction.interconnect_seconds) == (5.0, 2.0, 1.0)
    assert (prediction.largest_seconds, prediction.sum_seconds, prediction.bound_by) == (5.0, 8.0, "compute")
    assert predict(CHIP, 1.0, 20.0, 3.0).bound_by == "interconnect"
    between = predict(CHIP, 1.0, 20.0, 3.0, network_seconds=4.0)
    assert (between.bound_by, between.largest_seconds, between.sum_seconds) == ("network", 4.0, 9.01)


def test_float32_takes_six_products_of_bfloat16():
    assert with_peak_of(CHIP, "bfloat16") == CHIP
    assert predict(with_peak_of(CHIP, "float32"), 500.0, 20.0, 1.0).compute_seconds == pytest.approx(30.0)


def test_utilisation_is_of_the_formula_s_flops():
    assert utilisation(400.0, 8.0, CHIP) == pytest.approx(0.5)
