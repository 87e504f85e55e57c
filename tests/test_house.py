"""What holds for the whole house: imports run one way, help answers at once, configs are sound, files have tests."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
import weakref
from pathlib import Path

import pytest

from tfm.__main__ import COMMANDS, main
from tfm.commands.options import load_config, shipped_configs
from tfm.config import Config, InputError, from_dict, from_json

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


def test_help_lists_every_command_with_its_summary(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S.{{10,}}$", text, re.MULTILINE), command


def test_an_unknown_command_is_answered_by_one_line(capsys):
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tfm: error: trian: no such command; did you mean train?\n")
    assert main([]) == 2
    assert "expected one of train" in capsys.readouterr().err


@pytest.mark.parametrize("script", [["train.py"], ["-m", "tfm", "train"]])
def test_a_misspelt_option_ends_with_status_2_and_one_line(script):
    done = run(*script, "--config=base", "--model.d_modl=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "tfm train: error: --model.d_modl: unknown option; did you mean --model.d_model?\n"


def test_a_reader_that_leaves_ends_the_command_quietly():
    shell = f"{sys.executable} -m tfm translate --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")  # 0 where help was written before the reader had gone


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a.txt:3: not\nUTF-8"), 2, "tfm train: error: a.txt:3: not UTF-8\n"),
        (KeyboardInterrupt(), 130, "tfm: interrupted\n"),
    ],
)
def test_an_error_becomes_a_status_and_one_line(error, status, line, monkeypatch, capsys):
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("tfm.__main__._dispatch", fail)
    assert main(["train"]) == status
    assert capsys.readouterr().err == line


def test_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"tfm \d+\.\d+\.\d+\n", capsys.readouterr().out)


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
        "__main__.py": "test_house.py",
        "config_checks.py": "test_config.py",
        "data/demo_lexicon.py": "data/test_demo_grammar.py",
        "data/demo_builder.py": "data/test_demo_corpus.py",
        "commands/train.py": "test_end_to_end.py",
        **dict.fromkeys(
            (f"commands/{name}.py" for name in ("prepare", "translate", "translating", "score", "evaluate", "explain")),
            "commands/test_run_commands.py",
        ),
    }
    mirrored = ROOT / "tests" / tests.get(module.as_posix(), module.with_name(f"test_{module.name}"))
    assert mirrored.is_file(), f"tfm/{module} has no {mirrored.relative_to(ROOT)}"


WAIT = 20  # seconds


@pytest.mark.parametrize("dropped_by", ["garbage collector", "weak reference", "library", "nobody"])
def test_ctrl_c_is_not_lost_where_it_is_dropped_or_unseen(dropped_by, monkeypatch, capsys):
    """JAX has a callback of the garbage collector, and Python drops what a callback raises.

    And a signal that another thread gets, or that comes a moment before a wait, does not end the wait.
    """

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def in_garbage_collector(phase, info):
        if phase == "stop":
            gc.callbacks.remove(in_garbage_collector)
            press()

    def command(arguments):
        if dropped_by == "garbage collector":
            gc.callbacks.append(in_garbage_collector)
            gc.collect()
        elif dropped_by == "weak reference":
            thing = type("Thing", (), {})()
            reference = weakref.ref(thing, press)
            del thing
            assert reference() is None
        elif dropped_by == "library":
            with contextlib.suppress(BaseException):
                press()
        else:
            other = threading.Thread(target=time.sleep, args=[1])
            other.start()
            threading.Timer(0.1, signal.pthread_kill, [other.ident, signal.SIGINT]).start()
        time.sleep(WAIT)
        pytest.fail("it was lost")

    monkeypatch.setattr("tfm.__main__._dispatch", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = time.monotonic()
    try:
        assert main(["translate"]) == 130
        assert time.monotonic() - begun < WAIT, "it was not seen before the wait was over"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "tfm: interrupted\n"


def test_a_run_that_takes_ctrl_c_for_a_request_is_asked_once(monkeypatch):
    asked = []

    def command(arguments):
        before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            signal.signal(signal.SIGINT, before)
        time.sleep(0.5)
        return 0

    monkeypatch.setattr("tfm.__main__._dispatch", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["train"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [signal.SIGINT]


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
