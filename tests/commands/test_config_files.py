import pytest

from tfm.commands.config_files import load_config, shipped_configs
from tfm.config import InputError


def test_a_config_is_found_by_name_and_by_path():
    shipped = shipped_configs()
    assert {"demo", "multi30k", "base", "big", "wmt14_en_de"} <= set(shipped)
    assert load_config(str(shipped["big"])) == load_config("big")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("x = 1\ndef get_config(:\n", 2, "invalid syntax"),
        ("import no_such_module\n", 1, "no_such_module"),
        ("from tfm.config import *\n\ndef get_config():\n    return Config(modle=1)\n", 4, "modle"),
        ("from tfm.config import *\ndef get_config():\n    raise ConfigError('two fields')\n", 3, "two fields"),
        ("x = 1\n", None, "get_config"),
        ("def get_config():\n    return 3\n", None, "int"),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, text, line, reason):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    place = str(path) if line is None else f"{path}:{line}"
    assert str(caught.value).startswith(f"{place}: ")
    assert reason in str(caught.value)


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(f"{tmp_path}/missing.py")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("training=TrainingConfig(steps='100')", "training.steps='100': expected one whole number"),
        ("training=TrainingConfig(steps=1e5)", "training.steps=100000.0: expected one whole number"),
        ("training=TrainingConfig(steps=True)", "training.steps=True: expected one whole number"),
        ("data=DataConfig(corpus='demo')", "data.corpus='demo': expected one or more values"),
        ("model=ModelConfig(dropout_rate='0.1')", "model.dropout_rate='0.1': expected one number"),
        ("model=ModelConfig(d_k='8')", "model.d_k='8': expected one whole number or None"),
        ("mesh=None", "mesh is a NoneType: expected a tfm.config.MeshConfig"),
    ],
)
def test_a_value_of_another_type_in_a_config_file_is_refused(tmp_path, section, said):
    path = tmp_path / "mine.py"
    path.write_text(f"from tfm.config import *\ndef get_config():\n    return Config({section})\n")
    with pytest.raises(InputError) as refused:
        load_config(str(path))
    assert str(refused.value) == f"{path}: {said}"
