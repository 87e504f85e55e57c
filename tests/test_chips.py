"""Chips are found by what JAX calls them, and their figures are in order of size."""

from tfm.chips import GPUS, TPUS, chip_of


def test_chips_are_found_by_the_name_that_jax_gives_them():
    assert chip_of("TPU v5 lite") is TPUS["v5e"]
    assert chip_of("TPU v5") is TPUS["v5p"]
    assert chip_of("NVIDIA H200") is GPUS["H200"]
    assert chip_of("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert chip_of("NVIDIA H100 PCIe") is GPUS["H100 PCIe"]
    assert chip_of("NVIDIA A100-SXM4-80GB") is GPUS["A100"]
    assert chip_of("NVIDIA L4") is GPUS["L4"] and chip_of("NVIDIA L40S") is chip_of("NVIDIA L40") is None
    assert chip_of("NVIDIA H200 NVL") is GPUS["H200 NVL"]
    assert chip_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert chip_of("cpu") is None
    for chip in (*TPUS.values(), *GPUS.values()):
        assert chip.peak_flops > chip.memory_bandwidth > chip.link_bandwidth > 0
