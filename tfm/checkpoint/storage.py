"""A state to and from Orbax.

A state is a dict of pytrees of jax.Arrays. Each entry is an Orbax checkpointable, so that it can be read by itself, and
is stored as a flat dict of its leaves by path, so that Optax's named tuples need no handler of their own; empty nodes
and None are not stored and come back from the abstract state. Orbax is imported where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from tfm.files import AnyPath

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a directory that Orbax has not finished


def begin_save(directory: AnyPath, state: Mapping[str, Any]) -> Any:
    """Copies the arrays from the device and writes on in the background; `.result()` of what comes back waits.

    Raises OSError and Orbax's own errors; so does the `.result()`.
    """
    named = {entry: named_leaves(entry, tree) for entry, tree in state.items()}
    return _orbax().save_checkpointables_async(directory, {entry: leaves for entry, leaves in named.items() if leaves})


def load(directory: AnyPath, abstract_state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries named by `abstract_state`, and no others, with its structure, types and shardings.

    Raises ValueError for a leaf without a sharding: Orbax would take the saved one, and look for its devices.
    """
    named = {entry: named_leaves(entry, tree) for entry, tree in abstract_state.items()}
    wanted: dict[str, dict[str, Any]] = {}
    for entry, leaves in named.items():
        for name, leaf in leaves.items():
            if leaf.sharding is None:
                raise ValueError(f"{entry}/{name}: give the sharding to restore it in")
            abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            wanted.setdefault(entry, {})[name] = abstract
    loaded = _orbax().load_checkpointables(directory, wanted) if wanted else {}
    return {
        entry: jax.tree.unflatten(jax.tree.structure(tree), [loaded[entry][name] for name in named[entry]])
        for entry, tree in abstract_state.items()
    }


def named_leaves(entry: str, tree: Any) -> dict[str, Any]:
    """The leaves by path, in the tree's order: {"layers/attention/kernel": …}; a tree that is one leaf has "value".

    Raises TypeError for a leaf that is not an array, or a path that two leaves share.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or name in named:
            raise TypeError(f"{entry}/{name}: a state has one jax.Array for each path, not a {type(leaf).__name__}")
        named[name] = leaf
    return named


def describe(state: Mapping[str, Any]) -> dict[str, str]:
    """Every leaf's type and shape: {"parameters/embedding": "float32[512,64]", …}."""
    return {
        f"{entry}/{name}": f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for entry, tree in state.items()
        for name, leaf in named_leaves(entry, tree).items()
    }


class Mean:
    """The mean of several trees of one structure, summed in float32 where they lie, whatever their sharding."""

    def __init__(self) -> None:
        self._widen = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree))
        self._add = jax.jit(lambda total, tree: jax.tree.map(lambda x, y: x + y.astype(jnp.float32), total, tree))
        self._total: Any = None
        self._count = 0

    def add(self, tree: Any) -> None:
        self._total = self._widen(tree) if self._count == 0 else self._add(self._total, tree)
        self._count += 1

    def result(self, abstract: Any) -> Any:
        """The mean in the types and shardings of `abstract`."""

        def divide(total: Any) -> Any:
            return jax.tree.map(lambda x, like: (x / self._count).astype(like.dtype), total, abstract)

        return jax.jit(divide, out_shardings=jax.tree.map(lambda like: like.sharding, abstract))(self._total)


def _orbax() -> Any:
    """Orbax's interface, without its reports: a traceback a thread says no more than the error that we raise."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(_not_from_orbax)
    return v1


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname
