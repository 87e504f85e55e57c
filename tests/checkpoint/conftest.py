"""A new run, and one with three steps saved."""

import shutil

import pytest

from tests.checkpoint.states import small_state
from tfm.checkpoint import Checkpointer, RunDirectory
from tfm.config import Config


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", Config())


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3; copy it before changing anything."""
    run = RunDirectory.create(tmp_path_factory.mktemp("saved") / "run", Config())
    with Checkpointer(run) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, small_state(step), {"corpus": "abc"})
            checkpointer.note(step, float(-step))
    return run.path


@pytest.fixture
def copy(saved, tmp_path):
    return RunDirectory.open(shutil.copytree(saved, tmp_path / "copied"))
