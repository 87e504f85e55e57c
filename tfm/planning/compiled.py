"""The train step and the decode step, compiled for devices that need not be there, and what is counted of them."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from tfm import sharding
from tfm.config import Config
from tfm.data.batches import Batch
from tfm.decoding.decoder import Bucket, Decoder
from tfm.hlo.collectives import Collective, collectives_of
from tfm.hlo.costs import bytes_accessed, copied_bytes_by_xla, flops
from tfm.hlo.program import Program
from tfm.model import transformer
from tfm.model.dropout import dropout_key
from tfm.model.transformer import DecodeCache, Transformer, compute_dtype
from tfm.training.step import Trainer

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


class OutOfMemory(Exception):
    """The compiler found no way to lay a program out in a chip's memory."""

    def __init__(self, needed: float, room: float):
        super().__init__(f"needs {needed:.0f} bytes of {room:.0f}")
        self.needed, self.room = needed, room  # bytes


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one execution of a compiled program does on one chip, loops counted as often as they turn."""

    flops: float
    bytes_accessed: float  # as XLA counts them: in all memories, copies from one to the other included
    copied_bytes: float  # what such copies make up of that
    main_memory_bytes: float  # read from and written to the chip's main memory
    collectives: tuple[Collective, ...]
    calls_without_cost: int  # custom calls that don't declare their cost, and so count for nothing
    unknown_loops: int  # loops of which the program doesn't say how often they turn, and that are counted once


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for one chip of many: bytes as the compiler lays it out, and its counts."""

    temporary_bytes: float
    total_bytes: float  # arguments, results that take no argument's place, temporaries and the program itself
    counts: Counts


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One step of a search in the bucket that takes most memory."""

    bucket: Bucket
    beams: int
    parameter_bytes: float  # of a chip
    cache_bytes: float  # of a chip
    compiled: Compiled


def compile_train_step(trainer: Trainer) -> Compiled:
    """Compiles one update ahead of time. Raises OutOfMemory."""
    with jax.set_mesh(trainer.mesh):
        lowered = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch())
        return _compiled(lowered, trainer.mesh.size)


def activation_bytes(trainer: Trainer) -> float:
    """Bytes a device of what the backward pass keeps of the forward pass of a micro-batch, by JAX's own account.

    The compiler may keep less, where it computes something again, and lays some of it out with padding. An axis
    `tensor`, which splits part of it, is left out of account.
    """
    config = trainer.config
    rows = config.rows_per_batch // config.training.gradient_accumulation

    def backward(parameters: Any, batch: Batch) -> Any:
        key = dropout_key(config.training.seed, jnp.zeros((), jnp.int32), batch.rows)
        smoothing = config.training.label_smoothing
        return jax.vjp(lambda p: trainer.sums(p, batch, key, smoothing).loss, parameters)[1]

    def kept_of(rows: int) -> int:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), trainer.abstract_batch())
        with jax.set_mesh(trainer.mesh):
            kept = jax.tree.leaves(jax.eval_shape(backward, trainer.abstract_state.parameters, batch))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    # Parameters are kept as well, and are the same for twice the rows.
    return float(kept_of(2 * rows) - kept_of(rows)) / sharding.batch_shards(trainer.mesh)


def compile_decode_step(config: Config, mesh: Mesh) -> DecodeStep:
    """Compiles one step of a search, up to the likeliest token of each beam. Raises OutOfMemory."""
    model = Transformer(
        config.model, config.data.vocab_size, compute_dtype(config.model, mesh.devices.flat[0].platform)
    )
    decoder = Decoder([model], mesh, config.decoding, ())
    beams = config.decoding.n_best if config.decoding.sampling else config.decoding.beam_size
    # A short one mostly: it has as many more rows as it is shorter, and each has room for some further tokens as well.
    bucket = max(
        [*decoder.buckets, *decoder.long_buckets],
        key=lambda bucket: bucket.rows * _bytes_of_a_row(model, bucket, beams),
    )
    (parameters,) = decoder.abstract_parameters()
    source_BS = jax.ShapeDtypeStruct((bucket.rows, bucket.length), jnp.int32)
    mask_BS = jax.ShapeDtypeStruct(source_BS.shape, bool)

    def start(parameters: Any, source_BS: jax.Array, mask_BS: jax.Array) -> DecodeCache:
        return transformer.start_decoding(model, parameters, source_BS, mask_BS, beams=beams, length=bucket.room)

    rows = sharding.batch_sharding(mesh)
    heads = NamedSharding(mesh, sharding.spec_of(("activation_batch", "activation_heads", None, None)))
    cache = jax.eval_shape(start, parameters, source_BS, mask_BS)
    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=heads if leaf.ndim == 4 else rows),
        cache._replace(position=None),
    )
    tokens_BW = jax.ShapeDtypeStruct((bucket.rows, beams), jnp.int32, sharding=rows)

    def step(shared: tuple[Any, jax.Array], split: tuple[DecodeCache, jax.Array]) -> tuple[DecodeCache, jax.Array]:
        (parameters, position), (cache, tokens_BW) = shared, split
        logits_BWV, cache = transformer.decode_step(model, parameters, tokens_BW, cache._replace(position=position))
        return cache._replace(position=None), jnp.argmax(logits_BWV, axis=-1).astype(jnp.int32)

    position = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(sharding.per_device(step, mesh), donate_argnums=1)
        compiled = _compiled(program.lower((parameters, position), (cache, tokens_BW)), mesh.size)
    return DecodeStep(bucket, beams, bytes_on_a_device(parameters), bytes_on_a_device(cache), compiled)


def _bytes_of_a_row(model: Transformer, bucket: Bucket, beams: int) -> float:
    """Of the cache of a sentence, and of the logits of its beams."""
    c = model.config
    cached = (bucket.length + beams * bucket.room) * c.decoder_layers * c.num_heads * (c.key_width + c.value_width)
    return cached * model.dtype.itemsize + beams * model.vocab_size * 4.0


def bytes_on_a_device(placed: Any) -> float:
    """Bytes that each device has of a tree of placed shapes."""
    leaves = jax.tree.leaves(placed)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def state_bytes(trainer: Trainer) -> dict[str, float]:
    """Bytes a device of the parameters, of the optimizer's state and of the parameters' moving average."""
    state = trainer.abstract_state
    return {
        "parameters": bytes_on_a_device(state.parameters),
        "optimizer": bytes_on_a_device(state.optimizer),
        "moving_average": bytes_on_a_device(state.ema),
    }


def checkpoint_bytes(trainer: Trainer) -> float:
    """Bytes of a checkpoint: the whole state, once."""
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state)))


def _compiled(lowered: Any, devices: int) -> Compiled:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (told := _out_of_memory(str(error))) is None:
            raise
        raise told from error
    memory = compiled.memory_analysis()
    temporary = float(memory.temp_size_in_bytes)
    rest = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    total = memory.argument_size_in_bytes + temporary + rest
    return Compiled(temporary, float(total), counts_of(compiled, devices))


def counts_of(compiled: Any, devices: int) -> Counts:
    """XLA's cost analysis of a compiled program, with what its loops leave out.

    That analysis counts the body of a loop once. How much that leaves out is found in the program's text, where
    operations and operands can be counted both ways; XLA's figures are raised by these two ratios.
    """
    cost = compiled.cost_analysis()
    program = Program(compiled.as_text())
    flops_once, all_flops = flops(program)
    bytes_once, all_bytes = bytes_accessed(program)
    collectives = tuple(collectives_of(program, devices))
    calls = [
        instruction
        for _, instruction, _, _ in program.executed()
        if instruction.opcode == "custom-call"
        and "tpu_custom_call" in instruction.attributes
        and "cost_estimate" not in instruction.attributes
    ]
    return Counts(
        cost.get("flops", 0.0) * (all_flops / flops_once if flops_once else 1.0),
        cost.get("bytes accessed", 0.0) * (all_bytes / bytes_once if bytes_once else 1.0),
        copied_bytes_by_xla(program),
        bytes_accessed(program, in_main_memory=True)[1],
        collectives,
        len(calls),
        program.unknown_trips,
    )


def _out_of_memory(message: str) -> OutOfMemory | None:
    """What the TPU compiler says it needs: `Used 20.51G of 15.75G hbm`, or for far too much another sentence."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message) or re.search(
        r"total memory required for .*?\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message
    )
    if found is None:
        return None
    needed, room = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    return OutOfMemory(needed, room)
