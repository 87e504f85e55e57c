"""The environment of every test: eight simulated devices, strict shapes, nothing of the user's own; and tiny runs."""

import atexit
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tfm import config as tfm_config

assert "jax" not in sys.modules, "the settings below only hold if they are made before JAX is imported"

# Set in the environment, so that commands started by a test have them, too.
os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all the time goes into compiling small programs: without LLVM's optimisation, and with XLA's older writer of
# fused loops, which needs no MLIR, that takes half as long. Later versions have that writer no more.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# A [B, T] added to a [T] by accident is an error. Strict dtype promotion would be good to have, but optax.adam and
# flax.linen.LayerNorm in bfloat16 do not stand it.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# The same tiny programs come up in many tests and processes: each is compiled once a session, and never taken from one
# before it.
if "TFM_TEST_CACHE" not in os.environ:  # in the first process, which those of pytest-xdist are started from
    os.environ["TFM_TEST_CACHE"] = tempfile.mkdtemp(prefix="tfm-tests-")
    atexit.register(shutil.rmtree, os.environ["TFM_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TFM_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ.pop("TFDS_DATA_DIR", None)
# A shell starts what runs in its background with Ctrl-C ignored, and so would be the programs that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CONFIG = """
from pathlib import Path
from tfm.config import from_json

def get_config():
    return from_json(Path(__file__).with_suffix(".json"))
"""
# The files that take longest, the longest first. pytest-xdist hands out whole files: a long one that is begun last
# would leave the other processors with nothing to do.
_LONGEST = (
    "test_processes.py",
    "model/test_transformer.py",
    "test_shipped_configs.py",
    "decoding/test_search.py",
    "decoding/test_beam.py",
    "decoding/test_decoder.py",
    "test_resume.py",
    "test_sharding.py",
    "training/test_step.py",
    "benchmarking/test_sweep.py",
    "training/test_loop.py",
    "training/test_loop_starts.py",
    "benchmarking/test_train.py",
    "commands/test_translate.py",
    "test_end_to_end.py",
    "decoding/test_translator_model.py",
)
_WORDS = ("red", "blue", "green", "gold", "black", "white")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they come."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(_LONGEST)}
    assert all(path.is_file() for path in ranks), "a file of _LONGEST is not there"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of {split}.{lang}: sentences of 3 to 6 of six words (en), and the same backwards (de); none twice."""
    folder = tmp_path_factory.mktemp("reversal")
    generator = random.Random(7)
    sentences = list({tuple(generator.choices(_WORDS, k=generator.randint(3, 6))) for _ in range(4000)})
    sentences.sort()
    generator.shuffle(sentences)
    splits = {"test": sentences[:100], "validation": sentences[100:140], "train": sentences[140:]}
    for split, lines in splits.items():
        (folder / f"{split}.en").write_text("".join(" ".join(words) + "\n" for words in lines))
        (folder / f"{split}.de").write_text("".join(" ".join(words[::-1]) + "\n" for words in lines))
    return folder


@pytest.fixture(scope="session")
def tiny_config(reversal: Path) -> Callable[..., tfm_config.Config]:
    """`tiny_config({"training.steps": 5})`: a run of seconds on `reversal`, dropout on, with that changed."""
    base = tfm_config.Config(
        model=tfm_config.ModelConfig(
            d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1, norm="pre", dropout_rate=0.1
        ),
        data=tfm_config.DataConfig(
            corpus=(f"text:{reversal}/{{split}}.{{lang}}",),
            vocab_size=300,
            source_row_length=32,
            target_row_length=32,
        ),
        optimizer=tfm_config.OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        training=tfm_config.TrainingConfig(
            steps=6,
            target_tokens_per_batch=256,
            log_every=1,
            checkpoint_every=1000,
            evaluate_every=1000,
            evaluate_sentences=4,
        ),
        decoding=tfm_config.DecodingConfig(beam_size=1, max_source_length=16, tokens_per_batch=256, max_extra_tokens=4),
    )

    def make(changes: dict[str, object] | None = None) -> tfm_config.Config:
        return changed(base, changes or {}).validate()

    return make


@pytest.fixture(scope="session")
def config_file(
    tiny_config: Callable[..., tfm_config.Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, object]], Path]:
    """`config_file(changes)`: a file for `--config` with that tiny run."""

    def make(changes: dict[str, object]) -> Path:
        path = tmp_path_factory.mktemp("config") / "tiny.py"
        path.write_text(_CONFIG)
        path.with_suffix(".json").write_text(tiny_config(changes).to_json())
        return path

    return make


@pytest.fixture(scope="session")
def trained(tiny_config: Callable[..., tfm_config.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run of 4 steps, to be read alone."""
    from tfm.training.loop import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert train(tiny_config({"training.steps": 4}), workdir) == 0
    return workdir


def changed(config: tfm_config.Config, changes: dict[str, object]) -> tfm_config.Config:
    """The config with fields replaced by their dotted names."""
    for name, value in changes.items():
        section, field = name.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs see the first of the simulated devices alone: tiny steps are several times as fast."""
    import jax

    from tfm import sharding

    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config, devices=None: make_mesh(config, jax.devices()[:1]))
