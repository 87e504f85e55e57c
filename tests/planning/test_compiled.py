"""What the compiler is asked and what it answers, on simulated devices."""

import dataclasses
import re
from importlib.util import find_spec

import jax
import pytest

from tfm import sharding
from tfm.commands.config_files import load_config
from tfm.config import MeshConfig
from tfm.decoding.decoder import Decoder
from tfm.hlo.collectives import traffic
from tfm.hlo.program import Program
from tfm.model.transformer import Transformer
from tfm.planning import compiled
from tfm.planning.compiled import (
    activation_bytes,
    checkpoint_bytes,
    compile_decode_step,
    state_bytes,
)
from tfm.planning.formula import expected_traffic
from tfm.planning.topology import devices_of, topology_of
from tfm.training.step import trainer_of


def _trainer(config, mesh):
    return trainer_of(config, config.data.vocab_size, mesh)


@pytest.fixture(scope="module")
def trainer(tiny_config):
    return _trainer(tiny_config({"mesh.fsdp": 2}), sharding.make_mesh(MeshConfig(data=4, fsdp=2)))


def test_state_by_its_shards(trainer):
    parameters = jax.tree.leaves(trainer.abstract_state.parameters)
    whole = sum(4 * leaf.size for leaf in parameters)
    state = state_bytes(trainer)
    assert whole / 2 <= state["parameters"] < 0.6 * whole  # all but norms and biases are split in two
    assert state["optimizer"] == 2 * state["parameters"] + 4  # and Adam's count
    assert state["moving_average"] == 0
    assert checkpoint_bytes(trainer) == 3 * whole + 4 * 4


@pytest.mark.parametrize("name", ["base", "big"])
def test_fsdp_and_tensor_leave_an_eighth_of_the_state_to_each_device(name):
    trainer = _trainer(load_config(name), sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    assert sum(state_bytes(trainer).values()) <= 1.05 * checkpoint_bytes(trainer) / 8


def test_activations_grow_with_the_rows_of_a_micro_batch(tiny_config, trainer):
    mesh = sharding.make_mesh(MeshConfig())
    wide = _trainer(tiny_config({"training.target_tokens_per_batch": 512}), mesh)
    halved = _trainer(tiny_config({"training.target_tokens_per_batch": 512, "training.gradient_accumulation": 2}), mesh)
    assert activation_bytes(wide) == 2 * activation_bytes(halved) == 2 * activation_bytes(trainer) > 0


def test_the_decode_step_has_no_collective_without_tensor(tiny_config):
    config = tiny_config({"decoding.beam_size": 2})
    step = compile_decode_step(config, sharding.make_mesh(MeshConfig()))
    model, bucket = config.model, step.bucket
    positions = bucket.length + 2 * bucket.room  # keys of the source, and of each beam's past
    cache = bucket.rows / 8 * (4 * positions * 2 * model.d_model + bucket.length + 4 * 2 * bucket.room)
    assert (step.beams, step.cache_bytes) == (2, cache)
    assert step.compiled.counts.collectives == ()
    assert step.compiled.counts.unknown_loops == 0
    assert step.compiled.counts.flops > 0


@pytest.mark.parametrize(("extra", "is_long"), [(40, False), (400, True)])
def test_the_decode_step_is_that_of_the_bucket_that_takes_most_memory(tiny_config, extra, is_long):
    config = tiny_config({"decoding.max_source_length": 64, "decoding.max_extra_tokens": extra})
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    step = compile_decode_step(config, mesh)
    model = Transformer(config.model, config.data.vocab_size)
    decoder, needed = Decoder([model], mesh, config.decoding, ()), {}
    if is_long:
        assert step.bucket == decoder.long_buckets[0]
        return
    buckets = decoder.buckets
    for bucket in buckets:
        only = dataclasses.replace(config.decoding, max_source_length=bucket.length)
        only = dataclasses.replace(only, tokens_per_batch=bucket.rows * bucket.length, sentences_per_batch=bucket.rows)
        needed[bucket] = compile_decode_step(dataclasses.replace(config, decoding=only), mesh).compiled.total_bytes
    assert len(buckets) == 3 and step.bucket == max(buckets, key=needed.__getitem__)


def test_what_the_tpu_compiler_says_of_its_memory():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    told = compiled._out_of_memory(message)
    assert (told.needed, told.room) == (20.5 * 2**30, 15.75 * 2**30)
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00G) "
    told = compiled._out_of_memory(message + "exceeds available HBM (15.75G).")
    assert (told.needed, told.room) == (512 * 2**30, 15.75 * 2**30)
    assert compiled._out_of_memory("INTERNAL: something else") is None


@pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu: requirements-tpu.txt")
@pytest.mark.parametrize("length", [32, 128])  # with and without the kernel
def test_the_step_for_a_tpu_has_no_large_logits_no_generator_and_gives_its_state_away(tiny_config, length):
    sizes = {"data.source_row_length": length, "data.target_row_length": length}
    sizes |= {"training.target_tokens_per_batch": 128 * length, "model.d_model": 128}
    mesh = sharding.make_mesh(MeshConfig(), devices_of(topology_of("v5e:4x4")))
    trainer = _trainer(tiny_config(sizes), mesh)
    with jax.set_mesh(mesh):
        text = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile().as_text()
    assert "rng-bit-generator" not in text
    given = len(jax.tree.leaves(trainer.abstract_state))
    assert text.partition("entry_computation_layout")[0].count("may-alias") == given
    assert ("tpu_custom_call" in text) == (length == 128)
    program = Program(text)
    shapes = [instruction.shape for _, instruction, _, fused in program.executed() if not fused]
    assert any("bf16" in shape and "384]" in shape for shape in shapes)  # logits, of a vocabulary of 300 padded
    assert not [shape for shape in shapes if re.search(rf"f32\[(8,{length}|{8 * length}),384\]", shape)]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu: requirements-tpu.txt")
def test_weights_that_fsdp_splits_are_gathered_whole_for_a_tpu_not_passed_on_piece_by_piece(tiny_config):
    """Else each product is a loop over as many pieces as there are chips, of which the plan counts one turn."""
    sizes = {"data.source_row_length": 128, "data.target_row_length": 128, "training.target_tokens_per_batch": 2**16}
    sizes |= {"model.d_model": 512, "model.d_ff": 2048, "data.vocab_size": 32_000, "mesh.data": 1, "mesh.fsdp": 16}
    sizes |= {"model.encoder_layers": 2, "model.decoder_layers": 2}
    config = tiny_config(sizes)
    trainer = _trainer(config, sharding.make_mesh(config.mesh, devices_of(topology_of("v5e:4x4"))))
    counts = compiled.compile_train_step(trainer).counts
    assert counts.unknown_loops == 0
    parameters, where = trainer.abstract_state.parameters, trainer.state_shardings.parameters
    found = traffic(counts.collectives)
    expected = expected_traffic(trainer.mesh, parameters, where, 1, trainer.model.dtype)
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"].bytes == pytest.approx(expected["all-gather"], rel=0.1)
    summed = sum(found[kind].bytes for kind in set(found) - {"all-gather"})
    assert summed == pytest.approx(expected["all-reduce"] + expected["reduce-scatter"], rel=0.1)
