"""Plan a run: parameters, memory, FLOPs and predicted times, compiled for a TPU slice that nobody has to own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tfm.commands.lines import STANDARD_STREAM, check_outputs, write_text
from tfm.commands.options import parse
from tfm.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Say what a run needs and takes: on the devices at hand by formula or, with --topology, compiled for TPUs.

    Compiling takes libtpu, and no TPU: pip install -r requirements-tpu.txt. Times are predictions.
    """

    config: str | None = None
    """A shipped config (base), or the path of a .py file with get_config()."""
    workdir: str | None = None
    """Directory of a run, whose config is planned."""
    topology: tuple[str, ...] = ()
    """TPU slices to compile for, such as v5e:16x16; may be given more than once."""
    meshes: tuple[str, ...] = ()
    """Meshes to compare on each topology, data,fsdp,tensor, such as -1,1,1 -1,4,1; that of the config if unset."""
    rows_per_chip: int | None = None
    """Rows of the global batch for each chip, in place of training.target_tokens_per_batch."""
    parameters: bool = False
    """List every parameter: its logical axes, its mesh axes and its bytes on each device; for the first topology."""
    json: Path | None = None
    """File for the plan as JSON, a list where there is more than one; - is standard output."""
    picture: Path | None = None
    """File for a picture of predicted tokens/s against chips (.png)."""


def main(argv: list[str]) -> int:
    arguments, config = parse("plan", argv, Arguments)
    _check(arguments)
    from tfm.planning import plan, report, topology

    slices = [topology.topology_of(name) for name in arguments.topology]
    meshes = [plan.mesh_of(text, config.mesh.slices) for text in arguments.meshes] or [config.mesh]
    if slices:
        topology.no_accelerator_is_looked_for()
    if arguments.parameters:
        config = dataclasses.replace(config, mesh=meshes[0]).validate()
        print(report.parameter_table(plan.trainer_on(config, slices[0] if slices else None, arguments.rows_per_chip)))
        return 0
    if slices:
        following = plan.sweep(config, slices, meshes, arguments.rows_per_chip)
    else:
        following = iter([plan.plan_here(config, arguments.rows_per_chip)])
    plans: list[plan.Figures] = []
    try:
        for each in following:
            plans.append(each)
            if arguments.json != STANDARD_STREAM:
                print(report.table(each), flush=True)
    finally:  # each took minutes: those before one that fails are kept
        if plans and arguments.json is not None:
            alone = len(slices) * len(meshes) <= 1
            write_text(arguments.json, json.dumps(plans[0] if alone else plans, indent=2) + "\n")
    if arguments.json != STANDARD_STREAM and len(plans) > 1:
        print(report.sweep_table(plans))
    plan.refuse_what_does_not_fit(plans)
    if arguments.picture is not None:
        report.draw_sweep(plans, arguments.picture)
    return 0


def _check(arguments: Arguments) -> None:
    """Raises InputError at options that contradict each other, and at files that cannot be written."""
    if arguments.rows_per_chip is not None and arguments.rows_per_chip < 1:
        raise InputError(f"--rows_per_chip={arguments.rows_per_chip}: must be at least 1")
    if not arguments.topology and (arguments.meshes or arguments.picture):
        given = "--meshes" if arguments.meshes else "--picture"
        raise InputError(f"{given} compares plans for TPU slices: name them with --topology, such as v5e:16x16")
    if arguments.parameters and (len(arguments.meshes) > 1 or arguments.json or arguments.picture):
        given = "--json" if arguments.json else "--picture" if arguments.picture else "more than one of --meshes"
        raise InputError(f"--parameters prints a table for one mesh, and does not take {given}")
    check_outputs(arguments.json, arguments.picture)
