"""The time of a translation: the `Decoder`'s own compiled searches, and what of it is the first token and what a step.

All sentences have the same length and are made to translate into as many tokens, so that the number of steps is known
and what is compared is the speed of a search, not where it ends. The same program is also run on rows of padding alone,
which it leaves after one step: that tells the first token (the encoder, the keys and values of cross-attention, the
cache, and a step that beams have in common) from the further ones without a second program, which might be compiled
differently.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm import device_memory, sharding
from tfm.benchmarking import programs
from tfm.benchmarking.peak import MatmulPeak
from tfm.benchmarking.profile import profiled
from tfm.benchmarking.rates import per_second, utilisation
from tfm.config import Config
from tfm.data.tokenizer import BOS, EOS, PAD, UNK
from tfm.decoding.decoder import Bucket, Decoder
from tfm.device_memory import OutOfDeviceMemory
from tfm.model import transformer
from tfm.model.flops import decode_step_flops, prefill_flops
from tfm.model.transformer import (
    Transformer,
    abstract_parameters,
    compute_dtype,
    count_parameters,
    init_parameters,
)

BANNED = (PAD, BOS, UNK)
_PROFILED_SEARCHES = 2


@dataclasses.dataclass(frozen=True)
class DecodeTiming:
    """What is timed, and how often."""

    length: int = 32
    """Tokens of each sentence and of each translation, their end not counted."""
    steps: int = 10
    """Searches that are timed, of the sentences and of padding in turn."""
    warmup: int = 2
    profile: Path | None = None
    """Directory for a trace of a few more searches."""


def time_decoding(
    config: Config, devices: Sequence[Any], timing: DecodeTiming, peak: MatmulPeak, *, beams: int, sentences: int
) -> dict[str, Any]:
    """Times the search for the translations of so many sentences at once; the keys are those of the command's JSON.

    Args:
      config: of the run; random parameters.
      devices: that the sentences are split over (and the heads, where mesh.tensor says so).
      timing: what is timed.
      peak: of matrix products on these devices, which have another try after the timing.
      beams: hypotheses a sentence; 1 is greedy search.
      sentences: how many at once; rows of padding fill them up to a multiple of the devices.

    Raises:
      ConfigError: what the decoder raises, and heads that mesh.tensor does not divide.
      OutOfDeviceMemory: sentences that don't fit at once, and how many do.
    """
    mesh = sharding.decoding_mesh(config.mesh.tensor, devices)
    decoder, bucket = _fitting_decoder(config, mesh, timing.length, beams, sentences)
    model = decoder.models[0]
    generator = np.random.default_rng(0)
    ids = generator.integers(UNK + 1, model.vocab_size, (sentences, timing.length))
    full = functools.partial(decoder.decode, bucket, [[*row, EOS] for row in ids.tolist()])
    empty = functools.partial(decoder.decode, bucket, [])
    with device_memory.explained(f"{sentences:,} sentences with beams of {beams}"):
        seconds = _timed(full, empty, timing)
    lengths_B = sharding.on_host(full().lengths_BW)[:sentences, 0]
    if not np.all(lengths_B == timing.length):
        raise AssertionError(f"translations of {timing.length} tokens were asked for, and have {lengths_B}")
    compiled = decoder.search_program(bucket)
    trace = None
    if timing.profile is not None:
        trace = profiled(timing.profile, compiled, full, _PROFILED_SEARCHES, "search")
    memory = programs.memory(compiled, list(devices))  # before the peak's matrices are made again
    search, after_one_step = (float(np.median(times)) for times in seconds)
    # The end takes a step, since beams are ranked by its log-probability, too; greedy search without scores has none.
    steps = timing.length + (beams > 1)
    step = (search - after_one_step) / (steps - 1) if steps > 1 else 0.0
    # Devices search each by itself, and one whose rows are all padding leaves after the first step.
    rows_of_one = bucket.rows // sharding.batch_shards(mesh)
    busy_rows = -(-sentences // rows_of_one) * rows_of_one
    flops = prefill_flops(config.model, bucket.rows, bucket.length)
    # The first step is of a single beam, which sees as many slots of the cache as each of the others.
    for count, rows, hypotheses in ((1, bucket.rows, 1), (steps - 1, busy_rows, beams)):
        room = bucket.room * beams // hypotheses
        shape = (rows, hypotheses, bucket.length, room)
        flops += count * decode_step_flops(config.model, model.vocab_size, *shape)
    contents = {
        "sentences": sentences,
        "source_tokens": sentences * (timing.length + 1),
        "target_tokens": sentences * steps,
    }
    return {
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "dtype": model.dtype.name,
        "parameters": count_parameters(model),
        "vocab_size": model.vocab_size,
        "beam_size": beams,
        "sentences": sentences,
        "rows_per_batch": bucket.rows,
        "source_length": bucket.length,
        "target_length": steps,
        "warmup_searches": max(timing.warmup, 1),
        "searches": timing.steps,
        **programs.stage_seconds(*decoder.compile_stages["search", bucket, True]),
        **programs.spread("search", seconds[0]),
        "first_token_seconds_median": after_one_step,
        # Noise can hide a search of a few milliseconds, and one step has no further one: unknown is better than 0.
        "step_seconds_median": step if step > 0 else None,
        **per_second(contents, search, len(devices)),
        "row_padding": 1 - sentences / bucket.rows,
        **utilisation(
            flops,
            _counted_flops(decoder, bucket, beams, 1 + (steps - 1) * busy_rows / bucket.rows),
            search,
            devices=len(devices),
            device_kind=devices[0].device_kind,
            dtype=model.dtype.name,
            matmul_peak_flops=peak.again(),
        ),
        **memory,
        "collectives": programs.collectives(compiled, len(devices)),
        **({} if trace is None else {"profile": trace}),
    }


def _decoder(
    config: Config, mesh: jax.sharding.Mesh, length: int, beams: int, sentences: int
) -> tuple[Decoder, Bucket]:
    """A decoder with random parameters, and its bucket for so many sentences of `length` tokens and the end."""
    rows = -(-sentences // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    decoding = dataclasses.replace(
        config.decoding,
        beam_size=beams,
        n_best=1,
        sampling=False,
        min_length=length,
        max_extra_tokens=0,
        max_source_length=length + 1,
        tokens_per_batch=rows * (length + 1),
        sentences_per_batch=0,
    )
    model = Transformer(
        config.model, config.data.vocab_size, compute_dtype(config.model, mesh.devices.flat[0].platform)
    )
    boxed = abstract_parameters(model)  # laid out as those of a run are when they are read
    where = sharding.parameter_shardings(mesh, sharding.unboxed(boxed), sharding.logical_axes(boxed))
    decoder = Decoder([model], mesh, decoding, BANNED, scores=False)
    initial = jax.jit(lambda: init_parameters(model, config.training.seed), out_shardings=where)
    decoder.set_parameters(initial())
    return decoder, decoder.buckets[-1]


def _fitting_decoder(
    config: Config, mesh: jax.sharding.Mesh, length: int, beams: int, sentences: int
) -> tuple[Decoder, Bucket]:
    """`_decoder`, its search compiled. Raises OutOfDeviceMemory, naming how many sentences fit, where these don't."""

    def compiled(sentences: int) -> tuple[Decoder, Bucket]:
        what = f"a search over {sentences:,} sentences of {length + 1} tokens with beams of {beams}"
        with device_memory.explained(what):
            decoder, bucket = _decoder(config, mesh, length, beams, sentences)
            programs.refuse_larger(decoder.search_program(bucket), what, mesh.local_devices[0])
        return decoder, bucket

    def fits(sentences: int) -> bool:
        try:
            compiled(sentences)
        except OutOfDeviceMemory:
            return False
        return True

    try:
        return compiled(sentences)
    except OutOfDeviceMemory as error:
        most = programs.largest_power_of_two(sentences, fits)
        hint = "not even one fits" if most is None else f"{most:,} fit, the largest power of two that does"
        raise OutOfDeviceMemory(f"{error}; {hint}", error.needed, error.room) from error


def _timed(full: Callable[[], Any], empty: Callable[[], Any], timing: DecodeTiming) -> tuple[list[float], list[float]]:
    """Seconds of searches for the sentences and over padding, in turn, so that a busy machine slows both."""
    for _ in range(max(timing.warmup, 1)):  # the first one compiles
        jax.block_until_ready((full(), empty()))
    pairs = [(programs.seconds_of(full), programs.seconds_of(empty)) for _ in range(timing.steps)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _counted_flops(decoder: Decoder, bucket: Bucket, beams: int, steps: float) -> float | None:
    """FLOPs that XLA counts in the prefill and in so many steps of all rows; None where it cannot.

    Both and the first step are lowered by themselves, since in a search XLA counts the body of the loop once; the
    choice of tokens is left out.
    """
    model = decoder.models[0]
    abstract = jax.eval_shape(
        lambda: jax.tree.map(lambda p: p.astype(model.dtype), transformer.unstack(init_parameters(model, 0)))
    )
    source_BS = jax.ShapeDtypeStruct((bucket.rows, bucket.length), jnp.int32)

    def prefill(parameters: Any, source_BS: jax.Array) -> Any:
        mask_BS = source_BS != PAD
        return transformer.start_decoding(model, parameters, source_BS, mask_BS, beams=beams, length=bucket.room)

    def step(parameters: Any, tokens_BW: jax.Array, cache: Any) -> Any:
        return transformer.decode_step(model, parameters, tokens_BW, cache)

    cache = jax.eval_shape(prefill, abstract, source_BS)
    once = programs.lowered_flops(jax.jit(prefill).lower(abstract, source_BS))
    first, each = (
        programs.lowered_flops(jax.jit(step).lower(abstract, jax.ShapeDtypeStruct(shape, jnp.int32), cache))
        for shape in ((bucket.rows, 1), (bucket.rows, beams))
    )
    return None if once is None or first is None or each is None else once + first + (steps - 1) * each
