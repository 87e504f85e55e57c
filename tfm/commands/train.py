"""Train a run, or resume it: the same command again goes on from the newest checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from tfm.commands.options import parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a Transformer, or resume its training."""

    workdir: Path
    """Directory of the run: its config, tokenizer, checkpoints and numbers."""
    config: str | None = None
    """Name of a shipped config, or the path of a .py file with get_config(); the run's own if there is one."""


def main(argv: list[str]) -> int:
    arguments, config = parse("train", argv, Arguments)
    if config.training.deterministic:  # has to stand there before the first use of a GPU
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    from tfm import hosts
    from tfm.training.loop import TrainingDiverged, train

    with hosts.together(config):
        try:
            return train(config, arguments.workdir)
        except TrainingDiverged as error:
            logging.getLogger(__name__).error("%s", error)
            return 1
