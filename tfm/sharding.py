"""Devices, the mesh, and where every array lives on it: the only file that knows physical axes.

Modules name the axes of their parameters and activations logically; `RULES` alone maps these names to mesh axes.
Parameters and activations have names of their own, since one table for both would put batch and width on one axis.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.linen import meta
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tfm.allocator import keep_freed_memory
from tfm.config import ConfigError, MeshConfig

_log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "embed": "fsdp",
    "heads": "tensor",
    "kv": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    # activations
    "activation_batch": BATCH_AXES,
    "activation_length": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv": None,
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
}

_MOST_CPU_DEVICES = 16  # with more of them, each would have but a few sentences of a batch

LogicalAxes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the axes `AXES`, all Auto (Linen's logical metadata needs that), over all devices.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or cannot be laid out on their grid.
    """
    if devices is None:
        keep_freed_memory()
        devices = jax.devices()
    devices = list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % fixed:
            raise ConfigError(
                f"{asked}: {len(devices)} devices cannot be divided by {fixed}: they can be by {_listed(len(devices))}"
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"{asked}: needs {math.prod(sizes)} devices, and there are {len(devices)}")
    auto = (AxisType.Auto,) * len(AXES)
    if sizes[0] % config.slices:
        raise ConfigError(
            f"mesh.slices={config.slices} does not divide mesh.data={sizes[0]}, the only axis that crosses slices: "
            "lower mesh.fsdp or mesh.tensor"
        )
    if devices[0].platform == "cpu":  # topology-aware placement has nothing to know about simulated devices
        return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=auto)
    if (there := _slices(devices)) != config.slices:
        raise ConfigError(f"mesh.slices={config.slices}: the devices are in {there} slices: set it to that")
    within, across = (sizes[0] // config.slices, *sizes[1:]), (config.slices, 1, 1)
    try:  # an axis of the mesh may have a part of one of the grid's, as `jax.make_mesh` allows on v5e alone
        if config.slices == 1:
            grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    except NotImplementedError as error:
        raise ConfigError(f"{asked}: cannot be laid out on these devices: {' '.join(str(error).split())}") from error
    return Mesh(grid, AXES, axis_types=auto)


def _slices(devices: Sequence[Any]) -> int:
    """Slices of a TPU pod. JAX numbers the machines of GPUs likewise, but any axis may cross those."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def decoding_mesh(tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of devices, or all, for decoding: the batch over `data`, and `tensor` as given where they allow it, or 1.

    For decoding, fsdp is but a second name of data: the batch is split over both, and parameters over neither.
    """
    keep_freed_memory()
    devices = jax.devices() if devices is None else devices
    count, slices = len(devices), _slices(devices)
    if tensor < 1 or count // slices % tensor:
        each = "" if slices == 1 else f" in {slices} slices"
        _log.warning("mesh.tensor=%d: decodes with 1, since there are %d devices%s", tensor, count, each)
        tensor = 1
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor, slices=slices), devices)


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


def spec_of(names: LogicalAxes) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have these logical names (None: not split).

    Raises:
      ValueError: a name without a rule, or two names that map to one mesh axis; the message names both.
    """
    owner: dict[str, str] = {}
    spec = []
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r} in {names}: known are {', '.join(RULES)}")
        physical = RULES[name] if name is not None else None
        for axis in (physical,) if isinstance(physical, str) else physical or ():
            if axis in owner:
                raise ValueError(
                    f"logical axes {owner[axis]!r} and {name!r} of one array {names} both map to mesh axis {axis!r}"
                )
            owner[axis] = str(name)
        spec.append(physical)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells the compiler how an activation is split; without a mesh in scope (`jax.set_mesh`), `x` as it is.

    Within `per_device` the batch is split by hand, and only what is left to the compiler is said.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    left = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]

    def kept(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis in left)

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(kept(axes) or None for axes in spec_of(names))))


def per_device(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(shared, rows)` over the rows that each data shard has, as if it were alone: no shard waits for another.

    `shared` is whole on each of them, while `rows` and the result are trees whose leaves are split along dimension 0.
    The axis `tensor` is left to the compiler, as everywhere.
    """
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )


def per_device_and_head(function: Callable[..., jax.Array], per_head: Any, per_row: Any) -> jax.Array:
    """`function(per_head, per_row)` over the rows and heads that each device of the mesh in scope has, as if alone.

    Leaves are [B, L, H * K] per head, as is the result, and [B, L] per row. Without a mesh, the function as it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(per_head, per_row)
    whole = spec_of(("activation_batch", "activation_length", "activation_heads"))
    specs = (jax.tree.map(lambda _: whole, per_head), jax.tree.map(lambda _: PartitionSpec(*whole[:2]), per_row))
    return jax.shard_map(function, in_specs=specs, out_specs=whole, check_vma=False)(per_head, per_row)


def heads_on_a_device(heads: int) -> int:
    """Attention heads that one device of the mesh in scope has."""
    mesh = jax.sharding.get_abstract_mesh()
    return heads if mesh.empty else heads // mesh.shape[RULES["activation_heads"]]


def logical_axes(boxed: Any) -> Any:
    """Tree of logical axis names out of an abstract tree of parameters as Linen boxes them."""
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def unboxed(tree: Any) -> Any:
    """A tree of parameters without the boxes that hold their logical axes."""
    return meta.unbox(tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_on_mesh(rows: Any, mesh: Mesh) -> Any:
    """A tree of NumPy arrays, the same on every host, as arrays whose rows are split over the data axes."""
    where = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(rows, where)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda part: x[part]), rows)


def on_host(tree: Any) -> Any:
    """A tree of arrays on the mesh as NumPy arrays, whole on every host; several hosts call this together."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _listed(number: int) -> str:
    """The divisors of a number, as a text."""
    *most, last = [str(size) for size in range(1, number + 1) if number % size == 0]
    return f"{', '.join(most)} or {last}" if most else last


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def parameter_shardings(mesh: Mesh, abstract: Any, axes: Any) -> Any:
    """Shardings of a tree of parameters with the logical `axes` of `logical_axes`.

    Raises:
      ConfigError: a dimension that the mesh axes do not divide, with the parameter, the axis and the sizes.
    """

    def sharding(path: Any, leaf: Any, names: LogicalAxes) -> NamedSharding:
        spec = spec_of(names)
        for size, name, axis in zip(leaf.shape, names, spec, strict=True):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                raise ConfigError(
                    f"parameter {jax.tree_util.keystr(path)} has {size} along {name!r}, which mesh.{axis}={parts} "
                    f"does not divide: mesh.{axis} can be {_listed(math.gcd(size, mesh.size))}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)


def decode_shardings(mesh: Mesh, axes: Any) -> Any:
    """Shardings of parameters for decoding: split over `tensor` alone, for every step needs them all."""

    def sharding(names: LogicalAxes) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axis if axis == "tensor" else None for axis in spec_of(names))))

    return jax.tree.map(sharding, axes, is_leaf=lambda x: isinstance(x, tuple))


def optimizer_shardings(mesh: Mesh, state: Any, parameters: Any, axes: Any) -> Any:
    """Shardings of an Optax state: each leaf lies as the parameter whose path ends its own path.

    A factored statistic has its parameter's shape without one dimension, and its axes without that dimension's; what
    belongs to no parameter, such as a count, is replicated.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    is_axes = dict(is_leaf=lambda x: isinstance(x, tuple))
    names = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(axes, **is_axes)}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        keys = _names(path)
        for start in range(len(keys)):
            if keys[start:] in shapes:
                kept = _kept_axes(leaf.shape, shapes[keys[start:]], names[keys[start:]], keys[:start])
                return NamedSharding(mesh, spec_of(kept))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def placed(abstract: Any, shardings: Any) -> Any:
    """Shapes that say where they lie: each leaf of `abstract` with its sharding, out of a tree of the same form."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def _names(path: Any) -> tuple[str, ...]:
    """A tree path as the names along it."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _kept_axes(shape: tuple[int, ...], full: tuple[int, ...], axes: LogicalAxes, owner: tuple[str, ...]) -> LogicalAxes:
    """Axes of a statistic of this shape, whose parameter has the shape `full`."""
    if shape == full:
        return axes
    reduced = [i for i in range(len(full)) if full[:i] + full[i + 1 :] == shape]
    if not reduced:  # a placeholder, where the statistic is not kept in this form
        return (None,) * len(shape)
    # Of two equal dimensions Adafactor's rows lose the last and its columns the first.
    index = reduced[-1] if "v_row" in owner else reduced[0]
    return axes[:index] + axes[index + 1 :]
