"""What the demo says once it is trained: how many sentences of each category are right, and which are not."""

import re
from types import SimpleNamespace

import pytest

from tfm.commands import demo
from tfm.config import InputError
from tfm.data import demo_corpus
from tfm.decoding import translator


def test_each_category_is_reported_with_its_errors(monkeypatch, capsys, tmp_path):
    pairs = [
        {"en": f"{category} {n}", "de": f"{category} {n}, right", "category": category}
        for category in demo_corpus.CATEGORIES
        for n in range(4)
    ]
    wrong = {pairs[0]["en"], pairs[5]["en"]}

    def translate(sources):
        return [SimpleNamespace(text=f"{source}, {'wrong' if source in wrong else 'right'}") for source in sources]

    made = SimpleNamespace(steps=(7,), translate=translate)
    monkeypatch.setattr(demo, "trained", lambda config, workdir: 0)
    monkeypatch.setattr(demo_corpus, "data_source", lambda split: pairs)
    monkeypatch.setattr(translator.Translator, "load", lambda *_, **__: made)
    assert demo.main([f"--workdir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    for category in demo_corpus.CATEGORIES:
        right = 4 - sum(source.startswith(category) for source in wrong)
        assert f"{category}: {right} of 4 exact, error rate" in out
    assert "step 7" in out and f"expected   {pairs[0]['de']}" in out and f"{pairs[0]['en']}, wrong" in out
    assert re.search(rf"exact matches +{len(pairs) - 2} of {len(pairs)}", out)


def test_another_corpus_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.corpus=text:x: tfm demo trains on its own corpus"):
        demo.main([f"--workdir={tmp_path}", "--data.corpus=text:x"])


def test_a_training_that_fails_is_what_the_demo_ends_with(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "trained", lambda config, workdir: 3)
    assert demo.main([f"--workdir={tmp_path}"]) == 3
