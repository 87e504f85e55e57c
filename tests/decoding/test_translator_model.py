"""The translator with a model: what it says depends on a line alone, and what it is given is checked."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from tests.decoding.lines import CONFIG, LINES, MODEL_CONFIG
from tfm.config import MeshConfig
from tfm.decoding import translator as module
from tfm.decoding.search import Hypotheses
from tfm.decoding.translator import Translator
from tfm.model.transformer import Transformer
from tfm.sharding import make_mesh


def test_translations_of_a_model_are_lines_of_text(translator, translated):
    assert len(translated) == len(LINES)
    for line, translation in zip(LINES, translated, strict=True):
        assert len(translation.text.splitlines()) <= 1
        assert np.isfinite(translation.log_prob)
        assert (translation.log_prob == 0.0) == (not line.strip())
    assert len({t.text for t in translated}) > 10  # the source matters


def test_a_translation_depends_neither_on_its_company_nor_on_order(translator, translated):
    order = list(range(len(LINES)))
    random.Random(0).shuffle(order)
    assert translator.translate([LINES[i] for i in order]) == [translated[i] for i in order]
    for i in (0, 5, 10, 14, len(LINES) - 1):
        assert translator.translate([LINES[i]]) == [translated[i]]
    assert translator.translate([LINES[3]] * 9) == [translated[3]] * 9


def test_no_more_shapes_are_compiled_than_there_are_buckets(translator, translated):
    assert translated
    searched = {bucket for name, bucket, _ in translator.decoder.compile_stages if name == "search"}
    assert searched == set(translator.decoder.buckets)
    assert len(translator.decoder.buckets) == 2


def test_eight_devices_translate_as_one(tokenizer, parameters, translated):
    """Parameters and heads split in two, the batch in four."""
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    sharded = Translator([model], make_mesh(MeshConfig(2, 2, 2)), tokenizer, CONFIG)
    sharded.set_parameters(parameters)
    found = sharded.translate(LINES)
    assert [t.text for t in found] == [t.text for t in translated]
    np.testing.assert_allclose([t.log_prob for t in found], [t.log_prob for t in translated], rtol=1e-4, atol=1e-4)


def test_without_scores_greedy_search_gives_the_same_text(tokenizer, parameters, translated):
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    quick = Translator([model], mesh, tokenizer, CONFIG, scores=False)
    quick.set_parameters(parameters)
    found = quick.translate(LINES)
    assert [t.text for t in found] == [t.text for t in translated]
    assert all(t.log_prob == t.score == 0 for t in found)


def test_the_n_best_of_lines_and_of_their_parts(translator, tokenizer, parameters):
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    config = dataclasses.replace(CONFIG, beam_size=3, n_best=3)
    beams = Translator([model], make_mesh(MeshConfig(), jax.devices()[:1]), tokenizer, config)
    beams.set_parameters(parameters)
    lines = [LINES[0], "", LINES[-1]]
    found = beams.translate(lines)
    assert [len(t.hypotheses) for t in found] == [3, 1, 3]
    for translation in found:
        scores = [hypothesis.score for hypothesis in translation.hypotheses]
        assert scores == sorted(scores, reverse=True) and translation.score == scores[0]
        assert len({hypothesis.tokens for hypothesis in translation.hypotheses}) == len(scores)
    for hypothesis in found[0].hypotheses:
        assert tokenizer.decode([tokenizer.ids(hypothesis.tokens)]) == [hypothesis.text]
        assert hypothesis.score == pytest.approx(hypothesis.log_prob / ((6 + len(hypothesis.tokens)) / 6) ** 0.6)
    assert found[0].score >= translator.translate(lines[:1])[0].score - 1e-4
    whole = found[0].hypotheses
    scored = beams.score([LINES[0]] * 3, [hypothesis.tokens for hypothesis in whole])
    for one, other in zip(scored, whole, strict=True):
        assert one.tokens == other.tokens and len(one.token_log_probs) == len(one.tokens) + 1
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert sum(one.token_log_probs) == pytest.approx(one.log_prob, abs=1e-4)


def test_of_equal_texts_the_best_alone_is_told_but_each_draw_counts(translator, monkeypatch):
    """A model trained on several segmentations of each pair spells one text in many ways."""
    tokens = np.array([[[5, 1, 0], [6, 7, 1], [8, 1, 0]]])
    hypotheses = Hypotheses(tokens, np.array([[1, 2, 1]]), np.array([[-1.0, -2.0, -3.0]]), np.array([True]))
    monkeypatch.setattr(module.sharding, "on_host", lambda found: found)
    monkeypatch.setattr(translator.tokenizer, "decode", lambda ids: ["haus" if row[0] < 8 else "tür" for row in ids])
    for sampling, expected in ((False, ["haus", "tür"]), (True, ["haus", "haus", "tür"])):
        monkeypatch.setattr(translator, "config", dataclasses.replace(CONFIG, sampling=sampling))
        (found,) = translator._hypotheses(hypotheses, 1)
        assert [one.text for one in found] == expected
        assert found[0].log_prob == -1.0


def test_a_broken_model_still_gives_a_line_for_each_line(translator, parameters):
    translator.set_parameters(jax.tree.map(lambda p: p * np.nan, parameters))
    try:
        found = translator.translate(["haus", "", "tür und"])
    finally:
        translator.set_parameters(parameters)
    assert [t.text for t in found] == ["", "", ""]


def test_what_is_no_list_of_texts_is_refused(run, translated):
    loaded = Translator.load(run.path)
    mistakes = {
        r"lines: expected several, such as a list, and got one str": lambda: loaded.translate("red"),
        r"prefixes: expected several": lambda: loaded.translate(["red"], prefixes="red"),
        r"targets: expected several": lambda: loaded.score(["red"], "red"),
        r"ensemble: expected several": lambda: Translator.load(run.path, ensemble=str(run.path)),
        r"line 2: expected text, and got NoneType": lambda: loaded.translate(["", None]),
        r"prefix 1: expected text, and got int": lambda: loaded.translate(["red"], prefixes=[3]),
        r"source 1: expected text, and got bytes": lambda: loaded.score([b"red"], ["red"]),
        r"target 1: expected text, and got NoneType": lambda: loaded.score(["red"], [None]),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(TypeError, match=message):
            mistake()
