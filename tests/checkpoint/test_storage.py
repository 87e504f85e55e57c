"""A state to and from Orbax: to the bit, in its own structure, in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.checkpoint.states import abstract, assert_same
from tfm.checkpoint import Checkpointer, CheckpointReader


def optimizers():
    mask = {"dense": {"kernel": True, "bias": False}}
    return {
        "adam": optax.adam(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
        "masked": optax.chain(
            optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), mask), optax.scale_by_schedule(lambda n: n)
        ),
    }


@pytest.mark.parametrize("name", ["adam", "adafactor", "masked"])
def test_an_optimizer_state_comes_back_to_the_bit_in_its_own_structure(run, name):
    parameters = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 6)), "bias": jnp.ones(6)}}
    optimizer = optimizers()[name]
    _, inner = optimizer.update(parameters, optimizer.init(parameters), parameters)
    state = {"parameters": parameters, "ema": None, "optimizer": inner, "step": jnp.int32(5), "empty": {}}
    with Checkpointer(run) as checkpointer:
        checkpointer.save(5, state)
    assert_same(CheckpointReader(run).restore(abstract(state)).state, state)


def test_every_type_comes_back_to_the_bit(run):
    bits = np.array([0x7FC12345, 0x80000000, 0xFF800001, 1], np.uint32)  # NaNs with payloads, -0, a denormal
    state = {
        "parameters": {
            "float32": jnp.asarray(bits.view(np.float32)),
            "bfloat16": jnp.asarray((bits >> 16).astype(np.uint16).view(jnp.bfloat16)),
            "float16": jnp.array([-0.0, 1e-7, jnp.nan], jnp.float16),
            "float8": jnp.array([1.5, -0.0], jnp.float8_e4m3fn),
            "zeros": -jnp.zeros((3, 5)),
            **{f"{t}": jnp.array([[0, 1, 127]], t) for t in ("int8", "uint8", "int32", "uint32", "bool")},
        }
    }
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state)
    assert_same(CheckpointReader(run).restore(abstract(state)).state, state)


def test_a_sharded_state_comes_back_in_another_layout(run):
    wide = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    square = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    saved_as = NamedSharding(wide, PartitionSpec("fsdp"))
    state = {"parameters": {"w": jax.device_put(values, saved_as)}}
    with Checkpointer(run) as checkpointer:
        checkpointer.save(3, state)
    for sharding in (
        NamedSharding(square, PartitionSpec(None, "tensor")),
        NamedSharding(square, PartitionSpec()),
        SingleDeviceSharding(jax.devices()[5]),
    ):
        restored = CheckpointReader(run).restore(abstract(state, sharding)).state
        assert restored["parameters"]["w"].sharding == sharding
        assert_same(restored, state)
