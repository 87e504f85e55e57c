import dataclasses
from pathlib import Path

import pytest

from tfm.commands.config_files import load_config
from tfm.commands.options import parse
from tfm.config import Config, ConfigError, InputError, ModelConfig


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains."""

    config: str | None = None
    """A shipped config, or a path."""
    workdir: Path = Path("runs/default")
    """Directory of the run."""


@dataclasses.dataclass(frozen=True)
class Translate:
    """Translates."""

    workdir: Path
    """Directory of the run."""
    json: str | None = None
    """File of results; - is stdout."""
    quiet: bool = False
    """Say nothing."""


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    config = Config(model=ModelConfig(d_model=96, num_heads=3))
    (tmp_path / "config.json").write_text(config.to_json())
    return tmp_path


def train(*argv: str) -> tuple[Train, Config]:
    return parse("train", ["--config=base", *argv], Train)


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        train(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_overrides_the_config_is_the_named_one():
    assert train() == (Train(config="base"), load_config("base"))


def test_an_override_changes_its_field_and_no_other():
    own, config = train("--model.d_model=256", "--workdir=runs/x")
    base = load_config("base")
    assert own.workdir == Path("runs/x")
    assert config == dataclasses.replace(base, model=dataclasses.replace(base.model, d_model=256))


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        (["--model.d-ff", "1024"], "model", "d_ff", 1024),
        (["--model.d_k=48"], "model", "d_k", 48),
        (["--model.d_k=48", "--model.d_k=None"], "model", "d_k", None),
        (["--model.norm=pre"], "model", "norm", "pre"),
        (["--optimizer.learning_rate=1e-3"], "optimizer", "learning_rate", 1e-3),
        (["--data.corpus=text:a={lang}/{split}.{lang}"], "data", "corpus", ("text:a={lang}/{split}.{lang}",)),
        (["--data.corpus", "demo", "tfds:x;weight=2"], "data", "corpus", ("demo", "tfds:x;weight=2")),
        (["--data.corpus=demo", "tfds:x"], "data", "corpus", ("demo", "tfds:x")),
        (["--data.drop_duplicates"], "data", "drop_duplicates", True),
        (["--data.drop_duplicates=true"], "data", "drop_duplicates", True),
        (["--data.drop_duplicates", "False"], "data", "drop_duplicates", False),
        (["--data.store=gs://bucket/store"], "data", "store", "gs://bucket/store"),
        (["--mesh.data", "-1"], "mesh", "data", -1),
        (["--training.seed=1_000"], "training", "seed", 1000),
    ],
)
def test_values_are_typed(argv, section, name, value):
    got = getattr(getattr(train(*argv)[1], section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model.d_modl=3"], ["--model.d_modl", "did you mean --model.d_model?"]),
        (["--d_model=3"], ["--d_model", "did you mean --model.d_model?"]),
        (["--workdri=x"], ["--workdri", "did you mean --workdir?"]),
        (["--zzz"], ["--zzz", "tfm train --help"]),
        (["--model.d_model=x"], ["--model.d_model=x", "one whole number"]),
        (["--model.d_model=1.5"], ["--model.d_model=1.5", "one whole number"]),
        (["--model.d_model", "3", "4"], ["--model.d_model 3 4", "one whole number"]),
        (["--model.d_k=x"], ["--model.d_k=x", "one whole number or None"]),
        (["--model.norm=mid"], ["--model.norm=mid", "one of post, pre"]),
        (["--model.dropout_rate=lots"], ["--model.dropout_rate=lots", "one number"]),
        (["--optimizer.learning_rate=nan"], ["--optimizer.learning_rate=nan", "finite"]),
        (["--data.drop_duplicates=maybe"], ["--data.drop_duplicates=maybe", "True or False"]),
        (["--workdir="], ["--workdir", "empty", "one path"]),
        (["--model.d_model"], ["--model.d_model", "no value"]),
        (["--data.corpus"], ["--data.corpus", "no value"]),
        (["--training.steps=10", "--training.steps=ten"], ["--training.steps=ten", "one whole number"]),
        (["--config=bsae"], ["--config=bsae", "did you mean base?", "multi30k"]),
        (["--config=/nowhere/base.py"], ["/nowhere/base.py", "no such file", "--config=base"]),
    ],
)
def test_a_mistake_is_answered_by_one_line(argv, parts, capfd):
    message = refusal(*argv)
    assert capfd.readouterr() == ("", "")
    for part in parts:
        assert part in message


def test_several_corpora_may_be_given_one_by_one():
    corpora = ("text:A/{split}.{lang}", "text:B/{split}.{lang};weight=2")
    together, one_by_one = ["--data.corpus", *corpora], [f"--data.corpus={corpus}" for corpus in corpora]
    assert train(*together)[1].data.corpus == train(*one_by_one)[1].data.corpus == corpora


def test_a_list_in_a_config_file_is_what_the_run_has_when_it_is_read_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from tfm.config import *\ndef get_config():\n    return Config(data=DataConfig(corpus=['demo']))\n"
    )
    _, config = parse("train", [f"--config={path}"], Train)
    (tmp_path / "config.json").write_text(config.to_json())
    assert parse("translate", [f"--workdir={tmp_path}"], Translate)[1] == config


def test_a_path_may_begin_with_the_home_directory(run_directory, monkeypatch):
    monkeypatch.setenv("HOME", str(run_directory))
    assert parse("translate", ["--workdir=~"], Translate)[0].workdir == run_directory


def test_a_stray_argument_is_refused():
    with pytest.raises(InputError, match="runs/x: unexpected argument"):
        parse("train", ["runs/x", "--config=base"], Train)


def test_contradicting_fields_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.d_model=500.*model\.num_heads=8"):
        train("--model.d_model=500")


def test_a_missing_config_is_refused_with_the_shipped_names(tmp_path):
    with pytest.raises(InputError, match=r"--config is missing.*base.*multi30k"):
        parse("train", [f"--workdir={tmp_path}"], Train)


def test_the_config_of_a_run_directory_is_the_base(run_directory):
    own, config = parse("translate", ["--decoding.beam_size=4", f"--workdir={run_directory}", "--quiet"], Translate)
    assert own == Translate(workdir=run_directory, quiet=True)
    assert (config.model.d_model, config.decoding.beam_size) == (96, 4)


def test_training_goes_on_with_the_config_of_its_run_directory(run_directory):
    assert parse("train", ["--workdir", str(run_directory)], Train)[1].model.d_model == 96
    assert parse("train", ["--workdir", str(run_directory), "--config=big"], Train)[1].model.d_model == 1024


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not the directory of a run.*config\.json"):
        parse("translate", [f"--workdir={tmp_path}"], Translate)
    with pytest.raises(InputError, match="--workdir is missing"):
        parse("translate", [], Translate)


def test_a_broken_config_of_a_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"d_modl": 3}}')
    with pytest.raises(InputError, match=r"config\.json.*model\.d_modl.*did you mean model\.d_model"):
        parse("translate", [f"--workdir={tmp_path}"], Translate)


def test_help_shows_each_field_with_its_meaning_and_value(capsys):
    with pytest.raises(SystemExit) as stop:
        train("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: tfm train" in text
    assert "--model.d_model INT Width of the residual stream, in features. (default: 512)" in text
    assert "--data.vocab_size INT" in text
    assert "(default: 37000)" in text
    with pytest.raises(SystemExit):
        parse("train", ["--config=big", "--help"], Train)
    assert "in features. (default: 1024)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_needs_no_run_directory(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("translate", ["-h"], Translate)
    assert stop.value.code == 0
    assert "File of results; - is stdout." in capsys.readouterr().out
