"""The embedded corpus as a TFDS set: written, read, found again."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tfm.config import InputError
from tfm.data import demo_corpus
from tfm.data.corpus import parse_spec
from tfm.data.demo_grammar import sentences
from tfm.data.tfds_corpus import DemoCorpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A directory with the small set, prepared in a process of its own that has no TensorFlow."""
    directory = tmp_path_factory.mktemp("tfds")
    program = (
        "import importlib.machinery, sys\n"
        "find = importlib.machinery.PathFinder.find_spec\n"
        "importlib.machinery.PathFinder.find_spec = lambda name, *a: None if name == 'tensorflow' else find(name, *a)\n"
        "from tfm.data import demo_corpus\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "pairs = demo_corpus.data_source('test', config=demo_corpus.SMALL)\n"
        "assert len(pairs) == 100 and pairs[0]['category'] in demo_corpus.CATEGORIES\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    environment = os.environ | {"TFDS_DATA_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory


def test_set_is_what_the_grammar_draws(prepared):
    for split, size in (("train", 1000), ("validation", 100), ("test", 100)):
        pairs = demo_corpus.data_source(split, prepared, demo_corpus.SMALL)
        drawn = [{"en": pair.en, "de": pair.de, "category": pair.category} for pair in sentences(split, size, seed=0)]
        assert sorted(pairs, key=lambda pair: pair["en"]) == sorted(drawn, key=lambda pair: pair["en"])


def test_random_access(prepared):
    pairs = demo_corpus.data_source("test", prepared, demo_corpus.SMALL)
    rows = list(pairs)
    assert len(rows) == len(pairs) == 100
    assert pairs[-1] == rows[99]
    assert pairs[3:9:2] == rows[3:9:2]
    assert pairs.__getitems__([7, 0]) == [rows[7], rows[0]]
    assert pairs[5:5] == []
    for outside in (100, -101):
        with pytest.raises(IndexError):
            pairs[outside]


def test_a_damaged_set_is_named_with_what_to_do(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "sets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    monkeypatch.setattr(demo_corpus, "data_source", functools.partial(demo_corpus.data_source, config="small"))
    corpus = DemoCorpus(parse_spec("demo"), "en", "de")
    assert len(list(corpus.pairs("test"))) == 100
    (shard,) = (tmp_path / "sets").rglob("*test.array_record*")
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"sets cannot be read \(.*delete its directory there"):
        list(corpus.pairs("test"))


def test_written_anew_it_is_the_same(prepared, tmp_path):
    again = demo_corpus.data_source("train", tmp_path / "new" / "place", demo_corpus.SMALL)
    assert list(again) == list(demo_corpus.data_source("train", prepared, demo_corpus.SMALL))


def test_reads_like_any_set_of_tfds(prepared):
    import tensorflow_datasets as tfds

    source = tfds.data_source("demo_translation/small", data_dir=prepared, split="validation", download=False)
    assert source[0]["en"].decode() == demo_corpus.data_source("validation", prepared, demo_corpus.SMALL)[0]["en"]


def test_two_processes_that_write_at_once(tmp_path, monkeypatch):
    split_generators = demo_corpus.DemoTranslation._split_generators

    def overtaken(builder, dl_manager):
        monkeypatch.undo()
        demo_corpus.build(tmp_path, demo_corpus.SMALL)
        return split_generators(builder, dl_manager)

    monkeypatch.setattr(demo_corpus.DemoTranslation, "_split_generators", overtaken)
    assert len(list(demo_corpus.data_source("train", tmp_path, demo_corpus.SMALL))) == 1000
    assert not list(tmp_path.rglob("*incomplete*"))


def test_unknown_split():
    with pytest.raises(InputError, match="no split 'dev': its splits are train, validation, test"):
        demo_corpus.data_source("dev")


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written to .*file/data.*TFDS_DATA_DIR"):
        demo_corpus.data_source("test", tmp_path / "file" / "data")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TFDS_DATA_DIR": "/data/sets", "XDG_CACHE_HOME": "/cache"}, Path("/data/sets")),
        ({"XDG_CACHE_HOME": "/cache"}, Path("/cache/tfm")),
        ({"HOME": "/home/someone"}, Path("/home/someone/.cache/tfm")),
    ],
)
def test_default_directory(monkeypatch, environment, expected):
    for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert demo_corpus.default_directory() == expected
