"""Every shipped config compiles for eight devices, as it stands, without one of its arrays being made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tfm import sharding
from tfm.commands.config_files import load_config, shipped_configs
from tfm.config import Config, MeshConfig
from tfm.data.batches import Batch
from tfm.decoding.decoder import Decoder, Sentences
from tfm.model.transformer import Transformer, compute_dtype
from tfm.training.step import Trainer


def compiled(config: Config) -> dict[str, jax.stages.Compiled]:
    """The train step, the evaluation step and one decode, over all devices."""
    mesh = sharding.make_mesh(config.mesh)
    dtype = compute_dtype(config.model, "cpu")
    training = config.training
    model = Transformer(config.model, config.data.vocab_size, dtype, training.remat, training.unroll_layers or 1)
    trainer = Trainer(config, model, mesh)
    state = trainer.abstract_state
    rows = config.rows_per_batch

    def row_field(length: int | None = None) -> jax.ShapeDtypeStruct:
        shape = (rows,) if length is None else (rows, length)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))

    source, target = config.data.source_row_length, config.data.target_row_length
    batch = Batch(*[row_field(source)] * 3, *[row_field(target)] * 4, row_field())
    decoder = Decoder([model], mesh, config.decoding, banned=(0, 2, 3))
    decoder._parameters = decoder.abstract_parameters()
    bucket = decoder.buckets[0]
    sentences = Sentences(jax.ShapeDtypeStruct((bucket.rows, bucket.length), jnp.int32))
    search = functools.partial(decoder._search, bucket)
    with jax.set_mesh(mesh):
        return {
            "train": trainer.train_step.lower(state, batch).compile(),
            "evaluation": trainer.evaluation_step.lower(state.parameters, batch).compile(),
            "decode": decoder._program(search, "search", bucket, sentences),
        }


def assert_compiles(config: Config) -> None:
    before = sum(array.nbytes for array in jax.live_arrays())
    assert compiled(config.validate()).keys() == {"train", "evaluation", "decode"}
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20


@pytest.mark.parametrize("name", shipped_configs())
def test_compiles_for_eight_devices_as_shipped(name):
    assert_compiles(load_config(name))


def test_big_compiles_with_its_parameters_split():
    assert_compiles(dataclasses.replace(load_config("big"), mesh=MeshConfig(data=1, fsdp=4, tensor=2)))


@pytest.mark.parametrize("name", shipped_configs())
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_batches_divide_over_common_numbers_of_devices(name, devices):
    assert load_config(name).rows_per_batch % devices == 0
