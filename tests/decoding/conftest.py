"""A tiny model with its tokenizer, what it makes of lines, and the run directory that it would come from."""

import jax
import pytest

from tests.decoding.lines import CONFIG, LINES, MODEL_CONFIG, sentences
from tfm.checkpoint import Checkpointer, RunDirectory
from tfm.config import Config, MeshConfig
from tfm.data.tokenizer import Tokenizer, train_tokenizer
from tfm.decoding.translation import Translation
from tfm.decoding.translator import Translator
from tfm.model.transformer import Transformer, init_parameters
from tfm.sharding import make_mesh


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(sentences(400), tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 320)


@pytest.fixture(scope="session")
def parameters(tokenizer):
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    return jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, jax.jit(lambda: init_parameters(model, 2))())


@pytest.fixture(scope="session")
def translator(tokenizer, parameters) -> Translator:
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    translator = Translator([model], make_mesh(MeshConfig(), jax.devices()[:1]), tokenizer, CONFIG)
    translator.set_parameters(parameters)
    return translator


@pytest.fixture(scope="session")
def translated(translator) -> list[Translation]:
    return translator.translate(LINES)


@pytest.fixture(scope="session")
def run(tokenizer, parameters, tmp_path_factory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    (folder / "given.model").write_bytes(tokenizer.model)
    run = RunDirectory.create(folder / "run", Config(model=MODEL_CONFIG, decoding=CONFIG))
    run.install_tokenizer(folder / "given.model")
    with Checkpointer(run) as checkpointer:
        for step, factor in ((1, 1.0), (2, 0.0)):
            checkpointer.save(step, {"parameters": jax.tree.map(lambda p, f=factor: p * f, parameters)})
            checkpointer.note(step, -step)
    return run
