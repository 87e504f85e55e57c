"""The measured peak: of every library there is, and never below what was measured."""

import jax
import jax.numpy as jnp

from tfm.benchmarking import peak
from tfm.benchmarking.peak import MatmulPeak


def measured(dtype="float32", devices=1):
    return MatmulPeak(jax.devices()[:devices], jnp.dtype(dtype), sizes=(16, 32), seconds=0.001)


def test_every_library_and_size_is_measured(monkeypatch):
    monkeypatch.setattr(peak, "find_spec", lambda name: None)
    found = measured()
    assert [(one["library"], one["size"]) for one in found.measured] == [
        ("jax", 16),
        ("jax", 32),
        ("numpy", 16),
        ("numpy", 32),
    ]
    assert found.flops == max(one["flops"] for one in found.measured) > 0


def test_pytorch_is_measured_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(peak, "find_spec", lambda name: name)
    monkeypatch.setattr(peak, "_torch_products", lambda devices, dtype, size: lambda count: None)
    assert {one["library"] for one in measured().measured} == {"jax", "numpy", "torch"}
    monkeypatch.setattr(peak, "_torch_products", lambda devices, dtype, size: None)
    assert {one["library"] for one in measured().measured} == {"jax", "numpy"}


def test_other_types_are_jax_s_alone():
    assert {one["library"] for one in measured("bfloat16").measured} == {"jax"}


def test_another_try_only_raises_it(monkeypatch):
    found = measured()
    before = found.flops
    monkeypatch.setattr(found, "_flops", lambda library, size: 2 * before)
    assert found.again() == found.flops == 2 * before
    monkeypatch.setattr(found, "_flops", lambda library, size: before)
    assert found.again() == 2 * before


def test_all_devices_multiply_at_once(monkeypatch):
    """As many products as there are devices, in the time of one call."""
    monkeypatch.setattr(peak, "find_spec", lambda name: None)
    monkeypatch.setattr(peak, "_fastest", lambda products, seconds: products(1) or 1.0)
    found = {(one["library"], one["size"]): one["flops"] for one in measured(devices=4).measured}
    assert found["jax", 32] == 4 * 2 * 32**3
    assert found["numpy", 32] == 2 * 32**3
