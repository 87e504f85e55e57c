"""A corpus in text files, of a split to train on and one to validate with."""

from pathlib import Path

import pytest

from tests.data.stores import write_corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_corpus(tmp_path / "corpus", "train", range(1000, 1600))
    write_corpus(tmp_path / "corpus", "validation", range(1600, 1640))
    return tmp_path / "corpus"
