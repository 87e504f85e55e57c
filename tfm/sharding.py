"""Devices, the mesh, and where every array lives on it: the only file that knows physical axes.

Modules name the axes of their parameters and activations logically; `RULES` alone maps these names to mesh axes.
Parameters and activations have names of their own, since one table for both would put batch and width on one axis.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
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

LogicalAxes = tuple[str | None, ...]


def is_axes(leaf: Any) -> bool:
    """Whether it is the logical axes of one array: what a tree of them ends in."""
    return isinstance(leaf, tuple)


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
            + ("lower mesh.fsdp or mesh.tensor" if sizes[0] < len(devices) else "set it to what there is")
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

    For decoding, fsdp is but a second name of data: the batch is split over both, and parameters over neither. A
    `tensor` of -1 is 1: it says nothing of the devices of another machine than the run's.
    """
    keep_freed_memory()
    devices = jax.devices() if devices is None else devices
    count, slices = len(devices), _slices(devices)
    if tensor == -1:
        _log.warning("mesh.tensor=-1: decodes with 1; where a device cannot hold the model, give a number")
        tensor = 1
    elif count // slices % tensor:
        each = "" if slices == 1 else f" in {slices} slices"
        _log.warning("mesh.tensor=%d: decodes with 1, since there are %d devices%s", tensor, count, each)
        tensor = 1
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor, slices=slices), devices)


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
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _listed(number: int) -> str:
    """The divisors of a number, as a text."""
    *most, last = [str(size) for size in range(1, number + 1) if number % size == 0]
    return f"{', '.join(most)} or {last}" if most else last


def vocabulary_shards(mesh: Mesh) -> int:
    """Parts that the logits of one token are split into."""
    return mesh.shape[RULES["activation_vocab"]]


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

    return jax.tree.map(sharding, axes, is_leaf=is_axes)


def optimizer_shardings(mesh: Mesh, state: Any, parameters: Any, axes: Any) -> Any:
    """Shardings of an Optax state: each leaf lies as the parameter whose path ends its own path.

    A factored statistic has its parameter's shape without one dimension, and its axes without that dimension's; what
    belongs to no parameter, such as a count, is replicated.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    names = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)}

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
