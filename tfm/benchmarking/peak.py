"""The most that plain matrix products reach on these devices in this very run: what utilisation is measured against.

A published peak is a promise about a chip alone in the cold. What a shared machine, a virtual CPU or a throttled chip
can do at this moment has to be measured, and with more than one library: a poor product of one's own would flatter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tfm.model.projection import matmul_precision

_SIZES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
_SECONDS = 0.4  # for each library and size
_AT_ONCE = 8  # products sent before the last is waited for, so that sending them costs nothing


class MatmulPeak:
    """The best rate of square matrix products, over sizes and over JAX, NumPy and PyTorch where that is installed.

    Among several hosts each measures its own devices, while the others do the same, and takes all to be like its own:
    nothing is computed together, so that hosts may differ in how often they try.

    Args:
      devices: all of them multiply at once, each its own matrices, and the rate is that of all together.
      dtype: of the matrices; what is not float32 is measured with JAX, and on a GPU with PyTorch.
      sizes: rows of the matrices; by default, by the kind of device.
      seconds: for each library and size.
    """

    def __init__(
        self, devices: Sequence[Any], dtype: jnp.dtype, sizes: Sequence[int] | None = None, seconds: float = _SECONDS
    ) -> None:
        platform = devices[0].platform
        self.devices, self._dtype, self._seconds = tuple(devices), dtype, seconds
        self._own = [device for device in devices if device.process_index == jax.process_index()]
        self.measured: list[dict[str, Any]] = []
        """One of each library and size: {"library", "size", "flops"}, FLOP/s."""
        libraries = ["jax"]
        if platform == "cpu" and dtype == jnp.float32:
            libraries.append("numpy")
        if find_spec("torch") is not None and (platform == "gpu" or "numpy" in libraries):
            libraries.append("torch")
        for library in libraries:
            for size in sizes or _SIZES.get(platform, _SIZES["accelerator"]):
                flops = self._flops(library, size)
                if flops is not None:
                    self.measured.append({"library": library, "size": size, "flops": flops})

    @property
    def best(self) -> dict[str, Any]:
        """The fastest of what was measured."""
        return max(self.measured, key=lambda one: one["flops"])

    @property
    def flops(self) -> float:
        """FLOP/s of the best, of all devices together."""
        return self.best["flops"]

    def again(self) -> float:
        """The peak after the best library and size had another try: a busy machine may have become quieter."""
        best = self.best
        best["flops"] = max(best["flops"], self._flops(best["library"], best["size"]) or 0.0)
        return best["flops"]

    def _flops(self, library: str, size: int) -> float | None:
        """FLOP/s; None where the library cannot use these devices."""
        if library == "jax":
            products = _jax_products(self._own, self._dtype, size)
        elif library == "numpy":
            products = _numpy_products(size)
        else:
            products = _torch_products(self._own, self._dtype, size)
        if products is None:
            return None
        many = len(self._own) if library == "jax" else 1
        hosts = len(self.devices) / len(self._own)
        return hosts * many * 2.0 * size**3 / _fastest(products, self._seconds)


def _fastest(products: Callable[[int], None], seconds: float) -> float:
    """Least seconds of one product; `products(n)` does n of them and waits for the last."""
    products(1)
    start = time.perf_counter()
    products(1)
    least = time.perf_counter() - start
    end = start + seconds
    count = int(np.clip(seconds / 4 / max(least, 1e-9), 1, _AT_ONCE))
    while time.perf_counter() < end:
        begin = time.perf_counter()
        products(count)
        least = min(least, (time.perf_counter() - begin) / count)
    return least


def _jax_products(devices: Sequence[Any], dtype: jnp.dtype, size: int) -> Callable[[int], None]:
    mesh = Mesh(np.asarray(devices), ("all",))
    where = NamedSharding(mesh, PartitionSpec("all"))

    # Random, not all the same: a GPU with no bits to flip draws less power, and runs faster than it does with data.
    def filled(seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (len(devices), size, size), jnp.float32).astype(dtype)

    with jax.set_mesh(mesh):  # in place of a caller's, which may have the devices of other hosts
        a, b = (jax.jit(filled, static_argnums=0, out_shardings=where)(seed) for seed in range(2))

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=matmul_precision(dtype))

    product = jax.jit(multiply, in_shardings=(where, where), out_shardings=where)

    def products(count: int) -> None:
        with jax.set_mesh(mesh):
            for _ in range(count):
                result = product(a, b)
        jax.block_until_ready(result)

    return products


def _numpy_products(size: int) -> Callable[[int], None]:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((size, size), np.float32) for _ in range(2))
    out = np.empty_like(a)

    def products(count: int) -> None:
        for _ in range(count):
            np.matmul(a, b, out=out)

    return products


def _torch_products(devices: Sequence[Any], dtype: jnp.dtype, size: int) -> Callable[[int], None] | None:
    """None where PyTorch cannot use the device, or only one of several."""
    import torch

    platform = devices[0].platform
    if platform == "gpu" and (len(devices) > 1 or not torch.cuda.is_available()):
        return None
    kind = getattr(torch, dtype.name)
    # Where each process has a GPU of its own and sees all, PyTorch would take the first.
    where = f"cuda:{devices[0].local_hardware_id or 0}" if platform == "gpu" else "cpu"
    a, b = (torch.randn((size, size), device=where).to(kind) for _ in range(2))
    out = torch.empty_like(a)

    def products(count: int) -> None:
        for _ in range(count):
            torch.matmul(a, b, out=out)
        if platform == "gpu":
            torch.cuda.synchronize(where)

    return products
