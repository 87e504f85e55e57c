"""Explain a translation: where the model looks, as a table and as a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from tfm.commands.lines import STANDARD_STREAM, check_outputs, json_line, write_text
from tfm.commands.options import parse
from tfm.config import Config, InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Show the attention of a sentence's translation: what each token looked at while it was chosen."""

    workdir: str
    """Directory of the run."""
    source: str
    """The sentence itself, and not a file's name."""
    target: str | None = None
    """A translation to explain, in place of the model's own."""
    attention: Literal["cross", "encoder", "decoder"] = "cross"
    """The target's look at the source, or the self-attention of one of the stacks."""
    layer: int | None = None
    """A layer, from 1, whose heads are drawn one by one; if unset, all layers, each as the mean of its heads. The table
    has the mean over the heads of that layer, or of all."""
    picture: Path = Path("attention.png")
    """File for the picture, a PNG; one that is there is overwritten."""
    json: Path | None = None
    """File for the weights of all layers and heads, [layer][head][query][key], as JSON, overwritten; - is standard
    output."""
    checkpoint: str | None = None
    """Which parameters: a step, last, best, or the mean last:N or best:N; decoding.average, or the best, if unset."""


def main(argv: list[str]) -> int:
    arguments, config = parse("explain", argv, Arguments)
    _check(arguments, config)
    import jax

    from tfm import backend, device_memory, sharding
    from tfm.config import MeshConfig
    from tfm.decoding.explanation import draw, explain, table
    from tfm.decoding.loading import load_models

    backend.use_compilation_cache()
    one_device = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    with device_memory.explained("a sentence", "explain a shorter one, or lower decoding.beam_size"):
        loaded = load_models(arguments.workdir, config, arguments.checkpoint, mesh=one_device)
        explanation = explain(loaded, arguments.source, arguments.target)
    if arguments.json != STANDARD_STREAM:
        print(explanation.translation)
        print(table(explanation, arguments.attention, arguments.layer), end="")
    if arguments.json is not None:
        write_text(arguments.json, json_line(explanation.as_dict()) + "\n")
    draw(explanation, arguments.picture, arguments.attention, arguments.layer)
    return 0


def _check(arguments: Arguments, config: Config) -> None:
    depth = config.model.encoder_layers if arguments.attention == "encoder" else config.model.decoder_layers
    if arguments.layer is not None and not 1 <= arguments.layer <= depth:
        raise InputError(f"--layer={arguments.layer}: the stack has layers 1 to {depth}")
    check_outputs(arguments.json, arguments.picture)
