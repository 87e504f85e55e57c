"""A plan: what a run has, needs and takes, for the devices at hand or for a slice of TPUs that nobody has to own."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from tfm import device_memory, sharding
from tfm.chips import chip_of
from tfm.config import Config, InputError, MeshConfig
from tfm.hlo.collectives import BETWEEN_SLICES, traffic
from tfm.model.flops import decode_step_flops, train_step_flops
from tfm.model.transformer import count_parameters
from tfm.planning.compiled import (
    Compiled,
    Counts,
    OutOfMemory,
    activation_bytes,
    checkpoint_bytes,
    compile_decode_step,
    compile_train_step,
    state_bytes,
)
from tfm.planning.formula import expected_traffic
from tfm.planning.prediction import Prediction, predict, utilisation, with_peak_of
from tfm.planning.topology import Topology, collective_seconds, coordinates_of, devices_of
from tfm.training.step import Trainer, trainer_of

_log = logging.getLogger(__name__)

Figures = dict[str, Any]
"""Of a plan, or of a part of it, by name."""


def scaled(config: Config, rows_per_chip: int | None, chips: int) -> Config:
    """The config with a global batch of so many rows a chip; as it is where that is None."""
    if rows_per_chip is None:
        return config
    return config.with_rows(rows_per_chip * chips)


def mesh_of(text: str, slices: int = 1) -> MeshConfig:
    """`64,4,1` as data, fsdp and tensor of a mesh on so many slices. Raises InputError."""
    try:
        data, fsdp, tensor = (int(size) for size in text.split(","))
    except ValueError as error:
        raise InputError(f"--meshes {text}: expected data,fsdp,tensor, such as 64,4,1 or -1,4,1") from error
    return MeshConfig(data, fsdp, tensor, slices)


def trainer_on(config: Config, topology: Topology | None, rows_per_chip: int | None = None) -> Trainer:
    """The trainer on slices of TPUs, or on the devices at hand. Raises InputError as `plan_for` does."""
    devices = devices_of(_slices(config, topology)) if topology is not None else jax.devices()
    config = scaled(config, rows_per_chip, len(devices))
    mesh = sharding.make_mesh(config.mesh, devices)
    if rows_per_chip is None and config.rows_per_batch < sharding.batch_shards(mesh):
        raise InputError(
            f"training.target_tokens_per_batch={config.training.target_tokens_per_batch} makes "
            f"{config.rows_per_batch} rows, too few for {sharding.batch_shards(mesh)} pieces of it: raise it, or "
            "let it grow with the chips, as with --rows_per_chip=32"
        )
    # A vocabulary has `data.vocab_size` pieces until a tokenizer is trained.
    return trainer_of(config, config.data.vocab_size, mesh)


def _slices(config: Config, topology: Topology) -> Topology:
    """As many of that slice as the mesh is of."""
    return dataclasses.replace(topology, slices=config.mesh.slices)


def plan_here(config: Config, rows_per_chip: int | None = None) -> Figures:
    """Parameters, FLOPs by formula and memory on the devices at hand; nothing is compiled.

    Raises:
      ConfigError: a mesh or a batch that doesn't divide.
    """
    trainer = trainer_on(config, None, rows_per_chip)
    device = trainer.mesh.devices.flat[0]
    state, activations = state_bytes(trainer), activation_bytes(trainer)
    memory: Figures = {f"{name}_bytes": size for name, size in state.items()}
    memory["gradient_bytes"] = state["parameters"]
    memory["activation_bytes"] = activations
    total, available = sum(memory.values()), _memory_of(device)
    return {
        **_about(trainer),
        "device": device.device_kind,
        "memory_per_chip": {**memory, "total_bytes": total, "available_bytes": available},
        "fits": total <= available,
    }


def sweep(
    config: Config, slices: Sequence[Topology], meshes: Sequence[MeshConfig], rows_per_chip: int | None = None
) -> Iterator[Figures]:
    """`plan_for` of each slice with each mesh. What cannot be planned at all is refused before anything is compiled."""
    configs = [dataclasses.replace(config, mesh=mesh).validate() for mesh in meshes]
    for where in slices:
        for each in configs:
            trainer_on(each, where, rows_per_chip)
    for where in slices:
        for each in configs:
            yield plan_for(each, where, rows_per_chip)


def plan_for(config: Config, topology: Topology, rows_per_chip: int | None = None) -> Figures:
    """All that compiling the train step and the decode step for a slice of TPUs tells, and the predicted times.

    Of `mesh.slices` such slices where the config says so. A model that doesn't fit gives a plan with `fits` false and,
    under `lacking_bytes`, how much memory it lacks.

    Raises:
      InputError: no compiler, or a mesh or a batch that doesn't divide.
    """
    trainer, topology = trainer_on(config, topology, rows_per_chip), _slices(config, topology)
    topology = dataclasses.replace(topology, chip=with_peak_of(topology.chip, trainer.model.dtype.name))
    config, mesh = trainer.config, trainer.mesh
    about = {"topology": topology.name, "slices": topology.slices, "chip": topology.chip.name}
    plan = {**_about(trainer), **about}
    _log.info("%s: compiling the train step for the mesh %s", topology, dict(mesh.shape))
    start = time.perf_counter()
    try:
        step = compile_train_step(trainer)
    except OutOfMemory as error:
        lacking = error.needed - error.room
        memory = {f"{name}_bytes": size for name, size in state_bytes(trainer).items()}
        memory |= {"total_bytes": error.needed, "available_bytes": error.room}
        return {**plan, "memory_per_chip": memory, "fits": False, "lacking_bytes": lacking, "remedy": _remedy(trainer)}
    _log.info("%s: compiled in %.0f s; now the decode step", topology, time.perf_counter() - start)
    plan |= _train_plan(trainer, topology, step, plan)
    try:
        plan["decode"] = _decode_plan(config, topology, mesh, plan)
    except OutOfMemory as error:
        plan["fits"], plan["lacking_bytes"] = False, error.needed - error.room
        plan["remedy"] = "lower decoding.tokens_per_batch"
    if plan["fits"] and not plan["decode"]["fits_beside_train_state"]:
        plan["fits"] = False
        plan["lacking_bytes"] = plan["decode"]["bytes_with_train_state_per_chip"] - topology.chip.memory
        plan["remedy"] = "lower decoding.tokens_per_batch: an evaluation decodes beside the state of training"
    return plan


def _about(trainer: Trainer) -> Figures:
    """What is so on any chip."""
    model, data, rows = trainer.config.model, trainer.config.data, trainer.config.rows_per_batch
    return {
        "parameters": count_parameters(trainer.model),
        "mesh": {axis: int(size) for axis, size in trainer.mesh.shape.items()},
        "chips": trainer.mesh.size,
        "rows_per_step": rows,
        "target_tokens_per_step": rows * data.target_row_length,
        "flops_per_step": train_step_flops(
            model, data.vocab_size, rows, data.source_row_length, data.target_row_length
        ),
        "checkpoint_bytes": checkpoint_bytes(trainer),
    }


def _train_plan(trainer: Trainer, topology: Topology, step: Compiled, about: Figures) -> Figures:
    chip, counts = topology.chip, step.counts
    chips, tokens = about["chips"], about["target_tokens_per_step"]
    formula_flops = about["flops_per_step"] / chips
    prediction = _prediction(counts, topology, trainer.mesh)
    largest, total = prediction.largest_seconds, prediction.sum_seconds
    fits = step.total_bytes <= chip.memory
    return {
        "memory_per_chip": _memory(trainer, step, chip.memory),
        "fits": fits,
        **({} if fits else {"lacking_bytes": step.total_bytes - chip.memory, "remedy": _remedy(trainer)}),
        "flops_per_chip_by_xla": counts.flops,
        "flops_per_chip_by_formula": formula_flops,
        "flops_by_xla_over_formula": counts.flops / formula_flops,
        "bytes_accessed_per_chip": counts.bytes_accessed,
        "bytes_accessed_per_target_token": counts.bytes_accessed / (tokens / chips),
        "bytes_accessed_without_copies_per_target_token": (counts.bytes_accessed - counts.copied_bytes)
        / (tokens / chips),
        "main_memory_bytes_per_chip": counts.main_memory_bytes,
        "main_memory_bytes_per_target_token": counts.main_memory_bytes / (tokens / chips),
        "custom_calls_without_declared_cost": counts.calls_without_cost,
        "loops_of_unknown_length": counts.unknown_loops,
        "collectives": {kind: dataclasses.asdict(t) for kind, t in traffic(counts.collectives).items()},
        "collective_bytes_by_formula": _expected(trainer),
        "compute_seconds": prediction.compute_seconds,
        "memory_seconds": prediction.memory_seconds,
        "interconnect_seconds": prediction.interconnect_seconds,
        "network_seconds": prediction.network_seconds,
        "bound_by": prediction.bound_by,
        "predicted_step_seconds": largest,
        "predicted_step_seconds_as_sum": total,
        "predicted_target_tokens_per_second": tokens / largest,
        "predicted_target_tokens_per_second_as_sum": tokens / total,
        "predicted_model_flops_utilisation": utilisation(formula_flops, largest, chip),
        "predicted_model_flops_utilisation_as_sum": utilisation(formula_flops, total, chip),
    }


def _prediction(counts: Counts, topology: Topology, mesh: Mesh) -> Prediction:
    coordinates = coordinates_of(list(mesh.devices.flat), topology)
    interconnect, network = (
        sum(
            collective_seconds(one, topology, coordinates)
            for one in counts.collectives
            if (one.kind == BETWEEN_SLICES) is between
        )
        for between in (False, True)
    )
    return predict(topology.chip, counts.flops, counts.main_memory_bytes, interconnect, network)


def _memory(trainer: Trainer, step: Compiled, available: float) -> Figures:
    """Bytes on each chip. What the compiler holds beside the state is activations, as far as these are known."""
    state = state_bytes(trainer)
    activations = min(activation_bytes(trainer), step.temporary_bytes)
    known = sum(state.values()) + step.temporary_bytes
    return {
        **{f"{name}_bytes": size for name, size in state.items()},
        "activation_bytes": activations,
        "temporary_bytes": step.temporary_bytes - activations,
        "batch_program_and_padding_bytes": step.total_bytes - known,
        "total_bytes": step.total_bytes,
        "available_bytes": available,
    }


def _expected(trainer: Trainer) -> dict[str, float] | None:
    """The formula's bytes by kind; None on a mesh that it doesn't know."""
    if sharding.batch_shards(trainer.mesh) != trainer.mesh.size:
        return None
    return expected_traffic(
        trainer.mesh,
        trainer.abstract_state.parameters,
        trainer.state_shardings.parameters,
        trainer.config.training.gradient_accumulation,
        trainer.model.dtype,
        trainer.config.mesh.slices,
    )


def _decode_plan(config: Config, topology: Topology, mesh: Mesh, training: Figures) -> Figures:
    """The decode step, and whether that of validation has room beside the state of training. Raises OutOfMemory."""
    step = compile_decode_step(config, mesh)
    chip, counts, bucket = topology.chip, step.compiled.counts, step.bucket
    prediction = _prediction(counts, topology, mesh)
    state = sum(training["memory_per_chip"][f"{name}_bytes"] for name in ("parameters", "optimizer", "moving_average"))
    validating = dataclasses.replace(config, decoding=config.validation_decoding)
    beside = state + (step if validating == config else compile_decode_step(validating, mesh)).compiled.total_bytes
    formula = decode_step_flops(
        config.model, config.data.vocab_size, bucket.rows, step.beams, bucket.length, bucket.room
    )
    return {
        "sentences": bucket.rows,
        "source_length": bucket.length,
        "target_positions": bucket.room,
        "beams": step.beams,
        "parameter_bytes_per_chip": step.parameter_bytes,
        "cache_bytes_per_chip": step.cache_bytes,
        "temporary_bytes_per_chip": step.compiled.temporary_bytes,
        "bytes_with_train_state_per_chip": beside,
        "fits_beside_train_state": beside <= chip.memory,
        "flops_per_chip_by_xla": counts.flops,
        "flops_per_chip_by_formula": formula / topology.chips,
        "bytes_accessed_per_chip": counts.bytes_accessed,
        "main_memory_bytes_per_chip": counts.main_memory_bytes,
        "collectives": {kind: dataclasses.asdict(t) for kind, t in traffic(counts.collectives).items()},
        "predicted_step_seconds": prediction.largest_seconds,
        "predicted_step_seconds_as_sum": prediction.sum_seconds,
        "predicted_target_tokens_per_second": bucket.rows / prediction.largest_seconds,
    }


def _remedy(trainer: Trainer) -> str:
    """Which field to change so that a model fits, what costs least first."""
    config, ways = trainer.config, []
    parts = config.training.gradient_accumulation
    if config.rows_per_batch % (sharding.batch_shards(trainer.mesh) * 2 * parts) == 0:
        ways.append(f"training.gradient_accumulation={2 * parts}")
    if config.training.remat == "none":
        ways.append("training.remat=dots")
    fsdp = math.gcd(trainer.mesh.shape["data"] // config.mesh.slices, 8)  # of the chips of one slice
    if config.mesh.fsdp == 1 and fsdp > 1:
        ways.append(f"mesh.fsdp={fsdp} with mesh.data=-1")
    return "try " + " or ".join([*ways, "fewer training.target_tokens_per_batch (or --rows_per_chip)"])


def refuse_what_does_not_fit(plans: Sequence[Figures]) -> None:
    """Raises InputError where no plan fits: by how much the nearest does not, and which field to change."""
    if any(plan["fits"] for plan in plans):
        return

    def lacking_bytes(plan: Figures) -> float:
        memory = plan["memory_per_chip"]
        return plan.get("lacking_bytes", memory["total_bytes"] - memory["available_bytes"])

    plan = min(plans, key=lacking_bytes)
    lacking, memory = lacking_bytes(plan), plan["memory_per_chip"]
    remedy = plan.get("remedy", "fewer training.target_tokens_per_batch (or --rows_per_chip), or training.remat=full")
    raise InputError(
        f"{place(plan)}: does not fit: a chip with {memory['available_bytes'] / 2**30:.2f} GiB lacks "
        f"{lacking / 2**30:.2f} GiB; {remedy}"
    )


def place(plan: Figures) -> str:
    """What a plan is for, as a title has it."""
    if "topology" not in plan:
        return plan["device"]
    return plan["topology"] if plan["slices"] == 1 else f"{plan['slices']} x {plan['topology']}"


def _memory_of(device: Any) -> float:
    """Bytes of memory that a device has; where nobody says, what its kind has, or a share of the machine's."""
    room, chip = device_memory.room_of(device), chip_of(device.device_kind)
    if room is not None:
        return float(room)
    return chip.memory if chip is not None else float(device_memory.share_of_the_machine())
