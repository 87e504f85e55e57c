"""What the devices of a mesh have to say to one another in a step, by formula: what is compiled is held against it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tfm import sharding
from tfm.hlo.collectives import BETWEEN_SLICES


def expected_traffic(
    mesh: Mesh, parameters: Any, shardings: Any, micro_batches: int, dtype: Any, slices: int = 1
) -> dict[str, float]:
    """Bytes a step by kind, by formula, where only the batch axes split anything; scalars, such as the loss, left out.

    The gradient of a weight has the dtype of the matrix product that it comes from; those of tables, biases and norms
    are float32. They are summed over the batch once a micro-batch. A parameter that is whole on every device has its
    gradient all-reduced. One that is split (fsdp) is gathered for the forward pass, a weight again for the backward
    pass; its gradient is summed and cut by a reduce-scatter, and what is left of it is all-reduced over the other batch
    axis; over several slices by a reduce-scatter within each, an all-reduce of the pieces between them, and an
    all-gather. That is the least: the compiler may all-reduce a whole gradient where a reduce-scatter would do.

    Raises:
      ValueError: a mesh that splits more than the batch.
    """
    shards = sharding.batch_shards(mesh)
    if shards != mesh.size:
        raise ValueError("the formula is one of the batch axes alone")
    found = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter", BETWEEN_SLICES), 0.0)
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(shardings), strict=True
    ):
        is_weight = getattr(path[-1], "key", None) == "kernel"
        size = leaf.size * (jnp.dtype(dtype).itemsize if is_weight else 4.0) * micro_batches
        parts = leaf.size // math.prod(where.shard_shape(leaf.shape))
        if parts > 1:
            found["all-gather"] += (2.0 if is_weight else 1.0) * size
            found["reduce-scatter"] += size
        if shards > parts and slices == 1:
            found["all-reduce"] += size / parts
        elif shards > parts:
            alike = shards // parts // slices  # chips of a slice that have the same part
            for kind in ("reduce-scatter", "all-gather"):
                found[kind] += size / parts if alike > 1 else 0.0
            found[BETWEEN_SLICES] += size / parts / alike
    return {kind: size for kind, size in found.items() if size}
