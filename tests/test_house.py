"""What holds for the whole house: imports run one way, help is quick, configs are sound, files have tests."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tfm.__main__ import COMMANDS
from tfm.commands.config_files import load_config, shipped_configs
from tfm.config import Config, from_dict, from_json

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT / "tfm") for path in (ROOT / "tfm").rglob("*.py") if path.name != "__init__.py")
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "numpy", "tensorflow", "tensorflow_datasets", "matplotlib"}


def run(*argv: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL, **more
    )


def imported(*argv: str) -> set[str]:
    """Top-level packages that `python -m tfm ARGV` imports, as Python itself reports them."""
    done = run("-X", "importtime", "-m", "tfm", *argv)
    assert done.returncode == 0, done.stderr
    assert "usage: tfm" in done.stdout
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")}


def test_imports_run_one_way():
    done = run("-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_help_imports_nothing_heavy():
    packages = imported("--help")
    assert "tfm" in packages
    assert not packages & (HEAVY | {"tyro"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(command):
    packages = imported(command, "--help")
    assert "tyro" in packages
    assert not packages & HEAVY


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_is_sound_and_survives_storage(name, tmp_path):
    config = load_config(name).validate()
    assert from_dict(config.to_dict()) == config
    (tmp_path / "config.json").write_text(config.to_json())
    assert from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("name", "row"),
    [
        # Table 3 of the paper: N, d_model, d_ff, h, d_k, d_v, P_drop, eps_ls, train steps
        ("base", (6, 512, 2048, 8, 64, 64, 0.1, 0.1, 100_000)),
        ("big", (6, 1024, 4096, 16, 64, 64, 0.3, 0.1, 300_000)),
        ("wmt14_en_de", (6, 512, 2048, 8, 64, 64, 0.1, 0.1, 100_000)),
    ],
)
def test_the_paper_s_configs_are_the_paper_s(name, row):
    config = load_config(name)
    model, optimizer, training = config.model, config.optimizer, config.training
    assert model.encoder_layers == model.decoder_layers
    assert row == (
        model.encoder_layers,
        model.d_model,
        model.d_ff,
        model.num_heads,
        model.key_width,
        model.value_width,
        model.dropout_rate,
        training.label_smoothing,
        training.steps,
    )
    assert (model.norm, model.activation, model.tie_embeddings) == ("post", "relu", "all")
    assert (model.attention_dropout_rate, model.activation_dropout_rate, model.token_dropout_rate) == (0.0, 0.0, 0.0)
    assert (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == ("adam", 0.9, 0.98, 1e-9)
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.learning_rate) == ("inverse_sqrt", 4000, None)
    assert (optimizer.clip_norm, optimizer.ema_decay, optimizer.weight_decay) == (0.0, 0.0, 0.0)
    assert config.data.vocab_size == 37_000
    assert config.rows_per_batch * config.data.target_row_length == pytest.approx(25_000, rel=0.03)


def test_every_package_is_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent for path in (ROOT / "tfm").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == names | {"tfm.configs"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_tests(module):
    tests = {
        "__main__.py": "test_main.py",
        "config_checks.py": "test_config.py",
        "data/demo_lexicon.py": "data/test_demo_grammar.py",
        "data/demo_builder.py": "data/test_demo_corpus.py",
        "commands/train.py": "test_end_to_end.py",
        "commands/translating.py": "commands/test_translate.py",
    }
    mirrored = ROOT / "tests" / tests.get(module.as_posix(), module.with_name(f"test_{module.name}"))
    assert mirrored.is_file(), f"tfm/{module} has no {mirrored.relative_to(ROOT)}"


def test_the_readme_maps_every_file():
    """By its own line, or in that of its directory; the __init__.py of a package is in its directory's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped, above, folder = set(), {-2: ""}, ""
    for line in readme.partition("## A map of the house")[2].partition("\n## ")[0].split("\n"):
        entry = re.match(r"    ((?:  ){0,2})([^\s/]+/?)(?: .*)?$", line)
        if entry:
            depth = len(entry[1])
            folder = above[depth] = above[depth - 2] + entry[2]
            mapped.add(folder)
        if folder.endswith("/"):
            mapped |= {folder + listed for listed in re.findall(r"\w+\.py", line)}
    files = [f"tfm/{module.as_posix()}" for module in MODULES if module.name != "__init__.py"]
    files += [f"configs/{path.name}" for path in shipped_configs().values()]
    files += [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")]
    assert sorted(set(files) - mapped) == []
    assert sorted(name for name in mapped if name.endswith(".py") and not (ROOT / name).exists()) == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_lines_end_at_a_line_feed_and_nowhere_else(module):
    """str.splitlines also cuts at U+2028, U+0085 and the like, which stand in real sentences."""
    assert ".splitlines(" not in (ROOT / "tfm" / module).read_text(encoding="utf-8")


def test_the_environment_holds_eight_devices_and_strict_shapes():
    import jax

    assert jax.device_count() == 8
    assert jax.config.jax_numpy_rank_promotion == "raise"
    assert jax.config.jax_compilation_cache_dir == os.environ["TFM_TEST_CACHE"]
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_default_config_is_sound():
    assert Config().validate() == Config()
