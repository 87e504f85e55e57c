"""Small states and how they are compared, and damage done to what is stored of them."""

import os

import jax
import jax.numpy as jnp
import numpy as np


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def small_state(step: int) -> dict:
    return {
        "parameters": {"w": jnp.full((4, 6), step, jnp.float32), "b": jnp.arange(6.0) * step},
        "optimizer": {"mu": jnp.full((4, 6), -step, jnp.float32)},
        "step": jnp.int32(step),
    }


def assert_same(restored, state):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def array_file(directory):
    """The file that holds the arrays of the parameters."""
    return max((directory / "parameters").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def flip_bit(directory):
    path = array_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path.name


def cut_short(directory):
    path = array_file(directory)
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def listing(directory) -> dict:
    """Every name below `directory`, with the bytes or what a link points to."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found
