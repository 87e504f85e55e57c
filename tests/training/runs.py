"""Runs of the loop, and what is left of them."""

from pathlib import Path

from tfm.checkpoint import CheckpointReader, RunDirectory
from tfm.checkpoint.reader import ranked
from tfm.training.loop import Run
from tfm.training.metrics import read_events


def started(config, workdir, stack):
    return Run(config, RunDirectory.create(workdir, config.validate()), stack)


def logged(workdir, kind="train"):
    return [event for event in read_events(Path(workdir) / "metrics.jsonl") if event["kind"] == kind]


def best_and_kept(workdir: Path) -> tuple[list[int], list[int]]:
    reader = CheckpointReader(RunDirectory.open(workdir))
    return ranked(reader._known()), reader.steps()
