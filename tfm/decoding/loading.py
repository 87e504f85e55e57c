"""Models and their parameters out of run directories, as decoding takes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tfm import sharding
from tfm.checkpoint import CheckpointReader, RunDirectory
from tfm.config import Config, InputError
from tfm.data.tokenizer import Tokenizer
from tfm.decoding.inputs import several
from tfm.model.transformer import Transformer, abstract_parameters, compute_dtype

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The model of a run, and those that decode together with it."""

    config: Config
    tokenizer: Tokenizer
    mesh: Mesh
    models: tuple[Transformer, ...]
    parameters: tuple[Any, ...]  # of each model, as training has them
    steps: tuple[int, ...]  # the checkpoints that they are of


def load_models(
    workdir: str | Path,
    config: Config | None = None,
    checkpoint: str | int | None = None,
    ensemble: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Loaded:
    """What `Translator.load` translates with; its arguments."""
    run = RunDirectory.open(workdir)
    config = (config or run.config).validate()
    _refuse_other_model(run, config)
    tokenizer = _tokenizer(run)
    mesh = mesh or sharding.decoding_mesh(config.mesh.tensor)
    members = [(run, config, checkpoint if checkpoint is not None else config.decoding.average)]
    for member in several(ensemble, "ensemble"):
        folder, which = _member(member)
        other = RunDirectory.open(folder)
        if _tokenizer(other).sha256 != tokenizer.sha256:
            raise InputError(
                f"{other.tokenizer_path}: another tokenizer than {run.tokenizer_path}: models that translate "
                "together must share one"
            )
        members.append((other, other.config, which if which is not None else other.config.decoding.average))
    models, parameters, steps = [], [], []
    for its_run, its_config, which in members:
        dtype = compute_dtype(config.model, mesh.devices.flat[0].platform)  # one for all: their logits are averaged
        model = Transformer(its_config.model, tokenizer.vocab_size, dtype)
        boxed = abstract_parameters(model)
        abstract = sharding.unboxed(boxed)
        where = sharding.parameter_shardings(mesh, abstract, sharding.logical_axes(boxed))
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where)
        restored = CheckpointReader(its_run).restore_parameters(abstract, which)
        _log.info("%s: takes the parameters of step %s", its_run.path, ", ".join(map(str, restored.steps)))
        models.append(model)
        parameters.append(restored.state)
        steps.extend(restored.steps)
    return Loaded(config, tokenizer, mesh, tuple(models), tuple(parameters), tuple(steps))


def _refuse_other_model(run: RunDirectory, config: Config) -> None:
    """Raises InputError where a field makes another model of the same parameters: its translations would be wrong."""
    trained, now = vars(run.config.model), vars(config.model)
    for name in trained:
        if trained[name] != now[name] and name not in ("dtype", "attention"):
            raise InputError(f"model.{name}={now[name]}: the run {run.path} has {trained[name]}: leave it out")


def _tokenizer(run: RunDirectory) -> Tokenizer:
    if not run.tokenizer_path.exists():
        raise InputError(f"{run.tokenizer_path}: is missing: the run directory is not whole")
    return Tokenizer.load(run.tokenizer_path)


def _member(text: str) -> tuple[str, str | None]:
    """The run directory and the checkpoint of WORKDIR or WORKDIR@CHECKPOINT; the directory's path may have an @, too.

    Raises InputError where both readings are of a run.
    """
    folder, at, checkpoint = text.rpartition("@")
    if at and RunDirectory(text).exists():
        if RunDirectory(folder).exists():
            raise InputError(f"--ensemble={text}: is a run, and so is {folder}: rename one of them")
        return text, None
    return (folder, checkpoint) if at and "/" not in checkpoint else (text, None)
