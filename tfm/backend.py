"""JAX as this process has it: how many devices, and where compiled programs are kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from tfm.allocator import keep_freed_memory
from tfm.config import ConfigError

_MOST_CPU_DEVICES = 16  # with more of them, each would have but a few sentences of a batch


def first_devices(count: int | None) -> list[Any]:
    """The first `count` devices, or all, for a mesh of `make_mesh`; a CPU has as many as asked for, simulated.

    Raises ConfigError where there are fewer, or none are asked for.
    """
    if count is not None and count < 1:
        raise ConfigError(f"{count} devices are asked for: at least one is needed")
    keep_freed_memory()
    if count is not None and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # too late: with the devices that there are
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise ConfigError(f"{count} devices are asked for, and there are {len(devices)} ({devices[0].device_kind})")
    return devices[:count]


def decode_on_every_core() -> None:
    """Makes a device of each CPU core, where CPUs are all there is: to be called before anything has asked for devices.

    Searches on two devices run side by side; on one device, each of the many small operations of a step would be split
    over the cores, and wait for all of them: 0.7 times as fast, measured on two cores.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # too late: with the devices that there are
        jax.config.update("jax_num_cpu_devices", min(_MOST_CPU_DEVICES, cores))


def use_compilation_cache() -> None:
    """Has JAX keep compiled programs in the user's cache directory, so that the second start of a command is quick.

    Nothing is changed where JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE is set.
    """
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & os.environ.keys():
        return
    # Programs for a CPU hold its own instructions, and a home directory may be seen by several kinds of machine.
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().split("\n") if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    machine = hashlib.sha256(flags.encode()).hexdigest()[:8]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "tfm" / f"{platform.machine()}-{machine}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
