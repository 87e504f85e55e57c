"""Collectives of the train step by formula, against what was counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tfm import sharding
from tfm.config import MeshConfig
from tfm.planning.formula import expected_traffic


def test_the_formula_over_fsdp_by_hand():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    parameters = {"kernel": np.zeros((16, 8)), "scale": np.zeros(8), "table": np.zeros((100, 4))}
    shardings = {
        "kernel": NamedSharding(mesh, PartitionSpec("fsdp", None)),
        "scale": NamedSharding(mesh, PartitionSpec(None)),
        "table": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
    }
    assert expected_traffic(mesh, parameters, shardings, 3, jnp.bfloat16) == {
        "all-gather": 3 * (2 * 128 * 2 + 400 * 4),  # a table once, for both passes
        "reduce-scatter": 3 * (128 * 2 + 400 * 4),
        "all-reduce": 3 * (128 / 4 * 2 + 8 * 4 + 400 / 4 * 4),
    }
    assert expected_traffic(mesh, parameters, shardings, 1, jnp.bfloat16, slices=2) == {
        "all-gather": 2 * 128 * 2 + 400 * 4 + 8 * 4,
        "reduce-scatter": 128 * 2 + 400 * 4 + 8 * 4,
        "all-reduce-between-slices": 128 / 4 * 2 + 8 / 4 * 4 + 400 / 4 * 4,
    }
    with pytest.raises(ValueError, match="batch axes"):
        expected_traffic(sharding.make_mesh(MeshConfig(tensor=2)), parameters, shardings, 1, jnp.bfloat16)
