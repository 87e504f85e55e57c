"""Models out of run directories: which checkpoint, on which devices, and what is missing."""

import dataclasses
import sys

import pytest

from tests.decoding.lines import CONFIG, LINES, MODEL_CONFIG
from tfm.checkpoint import RunDirectory
from tfm.config import Config, ConfigError, InputError, MeshConfig
from tfm.decoding import loading
from tfm.decoding.translator import Translator


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", ("runs/a", None)),
        ("runs/a@best:3", ("runs/a", "best:3")),
        ("runs@home/a", ("runs@home/a", None)),
        ("runs@home/a@7", ("runs@home/a", "7")),
    ],
)
def test_the_checkpoint_of_an_ensemble_s_member(text, expected):
    assert loading._member(text) == expected


def test_an_ensemble_s_member_may_have_an_at_in_its_name(tmp_path):
    (tmp_path / "run@7").mkdir()
    (tmp_path / "run@7" / "config.json").touch()
    assert loading._member(f"{tmp_path}/run@7") == (f"{tmp_path}/run@7", None)
    assert loading._member(f"{tmp_path}/run@7@best") == (f"{tmp_path}/run@7", "best")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(InputError, match=r"run@7: is a run, and so is .*run: rename one of them"):
        loading._member(f"{tmp_path}/run@7")


def test_an_ensemble_s_member_where_nobody_can_look_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it isn't installed
    with pytest.raises(InputError, match=r"^gs://bucket/run@last: cannot be reached .*pip install"):
        loading._member("gs://bucket/run@last")


def test_the_translator_of_a_run_directory(run, translated):
    """The best checkpoint is the first; its short lines alone, for the sake of one compilation less."""
    short = [i for i, line in enumerate(LINES) if 0 < len(line) < 12]
    loaded = Translator.load(run.path)
    assert [t.text for t in loaded.translate([LINES[i] for i in short])] == [translated[i].text for i in short]
    assert loaded.config == CONFIG


@pytest.mark.parametrize(
    ("tensor", "why"), [(-1, "; where a device cannot hold the model"), (3, ", since there are 8 devices")]
)
def test_a_run_of_another_mesh_is_translated_with_on_this_machine(run, tensor, why, caplog):
    config = dataclasses.replace(run.config, mesh=MeshConfig(data=1, fsdp=2, tensor=tensor))
    loaded = Translator.load(run.path, config)
    assert dict(loaded.decoder.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert f"mesh.tensor={tensor}: decodes with 1{why}" in caplog.text


def test_models_that_decode_together_have_the_dtype_that_is_asked_for(run):
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, dtype="bfloat16"))
    models = loading.load_models(run.path, config, ensemble=[f"{run.path}@1"]).models
    assert [model.dtype.name for model in models] == ["bfloat16", "bfloat16"]


def test_a_mesh_that_does_not_divide_the_model_is_named(run):
    config = dataclasses.replace(run.config, mesh=MeshConfig(tensor=8))
    with pytest.raises(ConfigError, match=r"has 4 along 'heads', which mesh.tensor=8 does not divide"):
        Translator.load(run.path, config)


def test_what_a_run_directory_lacks_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: holds no run \(no config.json\)"):
        Translator.load(tmp_path / "nowhere")
    other = RunDirectory.create(tmp_path / "other", Config(model=MODEL_CONFIG))
    with pytest.raises(InputError, match=r"tokenizer.model: is missing"):
        Translator.load(other.path)
    other.install_tokenizer(run.tokenizer_path)
    with pytest.raises(InputError, match="no finished checkpoint"):
        Translator.load(other.path)
