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

from tfm.model.attention import matmul_precision

_SIZES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
_SECONDS = 0.4  # for each library and size
_AT_ONCE = 8  # products sent before the last is waited for, so that sending them costs nothing


def matmul_peak(
    devices: Sequence[Any], dtype: jnp.dtype, sizes: Sequence[int] | None = None, seconds: float = _SECONDS
) -> dict[str, Any]:
    """The best rate of square matrix products, over sizes and over JAX, NumPy and PyTorch where that is installed.

    Args:
      devices: all of them multiply at once, each its own matrices, and the rate is that of all together.
      dtype: of the matrices; what is not float32 is measured with JAX, and on a GPU with PyTorch.
      sizes: rows of the matrices; by default, by the kind of device.
      seconds: for each library and size.

    Returns:
      {"matmul_peak_flops": FLOP/s, "matmul_peak_of": {"library", "size"}, "matmul_peaks": [one of each measured]}.
    """
    platform = devices[0].platform
    sizes = sizes or _SIZES.get(platform, _SIZES["accelerator"])
    libraries: dict[str, Callable[[int], Callable[[int], None] | None]] = {
        "jax": lambda size: _jax_products(devices, dtype, size)
    }
    if platform == "cpu" and dtype == jnp.float32:
        libraries["numpy"] = _numpy_products
    if find_spec("torch") is not None and (platform == "gpu" or (platform == "cpu" and dtype == jnp.float32)):
        libraries["torch"] = lambda size: _torch_products(platform, len(devices), dtype, size)
    found = []
    for library, products_of in libraries.items():
        for size in sizes:
            products = products_of(size)
            if products is None:
                continue
            many = len(devices) if library == "jax" else 1
            flops = 2.0 * size**3 * many / _fastest(products, seconds)
            found.append({"library": library, "size": size, "flops": flops})
            del products  # its matrices
    best = max(found, key=lambda one: one["flops"])
    return {
        "matmul_peak_flops": best["flops"],
        "matmul_peak_of": {"library": best["library"], "size": best["size"]},
        "matmul_peaks": found,
    }


def higher(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of the peak, such as before and after a benchmark, the higher one."""
    return max(a, b, key=lambda one: one["matmul_peak_flops"])


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

    def filled() -> jax.Array:
        return jnp.full((len(devices), size, size), 1 / size, dtype)

    a, b = (jax.jit(filled, out_shardings=where)() for _ in range(2))

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=matmul_precision(dtype))

    product = jax.jit(multiply, in_shardings=(where, where), out_shardings=where)

    def products(count: int) -> None:
        for _ in range(count):
            result = product(a, b)
        jax.block_until_ready(result)

    return products


def _numpy_products(size: int) -> Callable[[int], None]:
    a, b = (np.full((size, size), 1 / size, np.float32) for _ in range(2))
    out = np.empty_like(a)

    def products(count: int) -> None:
        for _ in range(count):
            np.matmul(a, b, out=out)

    return products


def _torch_products(platform: str, devices: int, dtype: jnp.dtype, size: int) -> Callable[[int], None] | None:
    """None where PyTorch cannot use the device, or only one of several."""
    import torch

    if platform == "gpu" and (devices > 1 or not torch.cuda.is_available()):
        return None
    kind = getattr(torch, dtype.name)
    where = "cuda" if platform == "gpu" else "cpu"
    a, b = (torch.full((size, size), 1 / size, dtype=kind, device=where) for _ in range(2))
    out = torch.empty_like(a)

    def products(count: int) -> None:
        for _ in range(count):
            torch.matmul(a, b, out=out)
        if platform == "gpu":
            torch.cuda.synchronize()

    return products
