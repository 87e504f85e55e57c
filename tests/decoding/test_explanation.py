"""Attention as it is shown: by NumPy, by what must hold of any, and as a table and a picture."""

import dataclasses
import io
import math

import jax
import numpy as np
import pytest
import sentencepiece

from tfm.config import Config, DecodingConfig, InputError, MeshConfig, ModelConfig
from tfm.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, train_tokenizer
from tfm.decoding.explanation import Explanation, draw, explain, table
from tfm.decoding.loading import Loaded
from tfm.decoding.translator import Translator
from tfm.model.transformer import Transformer, init_parameters
from tfm.sharding import make_mesh

SOURCE = "alt haus und see"
MODEL = ModelConfig(d_model=16, d_ff=32, num_heads=4, encoder_layers=2, decoder_layers=3, norm="pre")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    words = ["haus", "tür", "baum", "weg", "see", "alt", "groß", "und"]
    lines = [f"{one} {other}" for one in words for other in words]
    tokenizer = train_tokenizer(lines, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)
    model = Transformer(MODEL, tokenizer.vocab_size, attention="pallas")  # which has no weights, and is left out
    parameters = jax.tree.map(lambda p: 1.5 * p, jax.jit(lambda: init_parameters(model, 1))())
    config = Config(model=MODEL, decoding=DecodingConfig(max_source_length=16, max_extra_tokens=4))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Loaded(config, tokenizer, mesh, (model,), (parameters,), (1,))


@pytest.fixture(scope="module")
def explained(loaded) -> Explanation:
    return explain(loaded, SOURCE)


def test_the_first_layer_s_weights_are_numpy_s(loaded, explained):
    tree = jax.tree.map(lambda p: np.asarray(p, np.float64), loaded.parameters[0])
    ids = [*loaded.tokenizer.encode([SOURCE])[0], EOS]
    angles = np.arange(len(ids))[:, None] / 10_000 ** (np.arange(0, 16, 2) / 16)
    positions = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(ids), 16)
    x_SD = tree["target_embedding"]["table"][ids] * math.sqrt(16) + positions
    layer = jax.tree.map(lambda p: p[0], tree["encoder"]["layers"])
    x_SD = (x_SD - x_SD.mean(1, keepdims=True)) / np.sqrt(x_SD.var(1, keepdims=True) + 1e-6)
    x_SD = x_SD * layer["self_norm"]["norm"]["scale"] + layer["self_norm"]["norm"]["bias"]
    kernels = (layer["self_attention"][name]["kernel"] for name in ("query", "key"))
    q_SHK, k_SHK = (np.einsum("SD,DHK->SHK", x_SD, kernel) for kernel in kernels)
    exponentials = np.exp(np.einsum("SHK,ZHK->HSZ", q_SHK, k_SHK) / math.sqrt(4))
    expected_HSS = exponentials / exponentials.sum(-1, keepdims=True)
    np.testing.assert_allclose(explained.encoder_NHSS[0], expected_HSS, atol=1e-5)


def test_what_holds_of_any_attention(explained):
    source, target = len(explained.source_tokens), len(explained.target_tokens)
    assert explained.cross_NHTS.shape == (3, 4, target, source)
    assert explained.encoder_NHSS.shape == (2, 4, source, source)
    assert explained.decoder_NHTT.shape == (3, 4, target, target)
    for attention in ("cross", "encoder", "decoder"):
        weights_NHQK = explained.weights(attention)
        np.testing.assert_allclose(weights_NHQK.sum(-1), 1, atol=1e-5)
        assert [len(tokens) for tokens in explained.labels(attention)] == list(weights_NHQK.shape[2:])
    assert not np.triu(explained.decoder_NHTT, 1).any()
    assert not np.allclose(explained.cross_NHTS[0], explained.cross_NHTS[1], atol=1e-2)


def test_what_is_explained_is_what_is_translated_and_scored(loaded, explained):
    translator = Translator(loaded.models, loaded.mesh, loaded.tokenizer, loaded.config.decoding)
    translator.set_parameters(*loaded.parameters)
    best = translator.translate([SOURCE])[0].hypotheses[0]
    assert (*best.tokens, "</s>") == explained.target_tokens and best.text == explained.translation
    assert sum(explained.token_log_probs) == pytest.approx(best.log_prob, abs=1e-4)
    again = explain(loaded, SOURCE, best.text)
    assert again.translation == best.text and again.source_tokens == explained.source_tokens
    given = explain(loaded, SOURCE, "baum")
    np.testing.assert_allclose(given.encoder_NHSS, explained.encoder_NHSS, atol=1e-6)
    assert "".join(given.target_tokens[:-1]).replace("▁", "") == "baum"


def test_one_sentence_is_translated_in_no_company(loaded, monkeypatch):
    """Of rows that only fill a batch, each would cost as much as the sentence."""
    made = []

    def recorded(*args):
        made.append(Translator(*args))
        return made[-1]

    monkeypatch.setattr("tfm.decoding.explanation.Translator", recorded)
    explain(loaded, SOURCE)
    assert {key[1].rows for key in made[0].decoder.compile_stages} == {1}


def test_what_has_no_attention_to_show_is_named(loaded):
    with pytest.raises(InputError, match="the source is blank"):
        explain(loaded, " ")
    with pytest.raises(InputError, match=r"tokens, end included, more than decoding.max_source_length=16"):
        explain(loaded, "haus " * 16)
    with pytest.raises(InputError, match="the target is longer than what is scored"):
        explain(loaded, "haus", "tür " * 40)


def test_a_target_may_have_signs_that_the_tokenizer_lacks(loaded):
    """One of the user's own may have no pieces for single bytes."""
    trained = io.BytesIO()
    words = iter(["haus tür baum weg see"] * 50)
    special = dict(pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_writer=trained, vocab_size=24, **special)
    tokenizer = Tokenizer(trained.getvalue())
    model = Transformer(MODEL, tokenizer.vocab_size)
    parameters = jax.jit(lambda: init_parameters(model, 1))()
    own = dataclasses.replace(loaded, tokenizer=tokenizer, models=(model,), parameters=(parameters,))
    explained = explain(own, "haus", "tür 🙂")
    assert "<unk>" in explained.target_tokens and len(explained.target_tokens) == explained.cross_NHTS.shape[2]


@pytest.fixture
def small() -> Explanation:
    cross = np.zeros((2, 2, 2, 3), np.float32)
    cross[0] = [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]
    cross[1] = [[0.0, 0.002, 0.998], [0.0, 0.0, 1.0]]
    decoder = np.broadcast_to(np.float32([[1, 0], [0.25, 0.75]]), (2, 2, 2, 2))
    encoder = np.broadcast_to(np.eye(3, dtype=np.float32), (1, 2, 3, 3))
    return Explanation(("▁a", "$b$", "</s>"), ("▁x", "</s>"), "x", (-0.5, -1.25), cross, encoder, decoder)


def test_a_table_has_a_line_for_each_query(small):
    assert table(small, layer=1).split("\n") == [
        "   token  log prob  looks at",
        "1  ▁x     -0.50     ▁a 50%, $b$ 30%, </s> 20%",
        "2  </s>   -1.25     </s> 100%",
        "",
    ]
    assert "1  ▁x     -0.50     </s> 60%, ▁a 25%, $b$ 15%\n" in table(small)
    assert table(small, "decoder").endswith("2  </s>   -1.25     ▁x 75%, <s> 25%\n")
    assert (
        table(small, "encoder", 1) == "   token  looks at\n1  ▁a     ▁a 100%\n2  $b$    $b$ 100%\n3  </s>   </s> 100%\n"
    )


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_that_is_none_is_named(small, tmp_path, layer):
    with pytest.raises(InputError, match=f"layer {layer}: the stack has layers 1 to 2"):
        table(small, layer=layer)
    with pytest.raises(InputError, match=f"layer {layer}: the stack has layers 1 to 2"):
        draw(small, tmp_path / "a.png", layer=layer)


@pytest.mark.parametrize(("attention", "layer", "panels"), [("cross", None, 2), ("cross", 2, 2), ("encoder", None, 1)])
def test_a_picture_has_a_panel_for_each_layer_or_head(small, tmp_path, monkeypatch, attention, layer, panels):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda self, panel, **_: drawn.append(panel))
    draw(small, tmp_path / "a.png", attention, layer)
    assert len(drawn) == panels and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    weights = small.weights(attention)
    np.testing.assert_allclose(drawn, weights.mean(1) if layer is None else weights[layer - 1])


def test_signs_that_the_font_lacks_are_said(small, tmp_path, caplog):
    draw(small, tmp_path / "a.png")
    assert not caplog.messages
    draw(dataclasses.replace(small, target_tokens=("▁狗", "</s>")), tmp_path / "b.png")
    assert caplog.messages == [f"{tmp_path / 'b.png'}: the font has no signs for some of the tokens, which are boxes"]
    with pytest.raises(InputError, match=r"nowhere/a.png: cannot be written"):
        draw(small, tmp_path / "nowhere" / "a.png")
