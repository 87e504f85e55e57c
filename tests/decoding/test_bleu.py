"""Scores against hand-computed ones and against sacreBLEU's own functions."""

import importlib.util

import pytest
import sacrebleu

from tfm.decoding.bleu import corpus_scores, tokenised_bleu

HYPOTHESES = ["the cat sat on the mat", "Ein Haus, das steht.", "Guten Tag!"]
REFERENCES = ["the cat sat on a mat", "Ein Haus, das noch steht.", "guten Tag!"]


def test_bleu_of_one_sentence_by_hand():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are right, and nothing is too short."""
    score = corpus_scores(HYPOTHESES[:1], REFERENCES[:1])["bleu"]
    assert score.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_a_corpus_that_is_right_scores_100():
    scores = corpus_scores(REFERENCES, REFERENCES)
    assert {name: round(score.value, 6) for name, score in scores.items()} == {"bleu": 100, "chrf": 100}


def test_scores_are_sacrebleu_s_with_its_defaults():
    scores = corpus_scores(HYPOTHESES, REFERENCES)
    assert scores["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert scores["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score)
    assert 0 < scores["bleu"].value < 100


def test_text_without_blanks_is_not_one_word_a_sentence():
    """10 of 11 characters are right, 7 of 10 pairs, 6 of 9 triples and 5 of 8 quadruples."""
    hypotheses, references = ["狗在绿色的草地上跑步。"], ["狗在绿色的草地上奔跑。"]
    as_one_word = corpus_scores(hypotheses, references, "de")["bleu"].value
    for language, tokens in (("zh", "zh"), ("zh_CN", "zh"), ("ja", "char"), ("th-TH", "char")):
        score = corpus_scores(hypotheses, references, language)["bleu"]
        assert f"tok:{tokens}" in score.signature
        assert score.value == pytest.approx(100 * (10 / 11 * 7 / 10 * 6 / 9 * 5 / 8) ** 0.25)
        assert as_one_word < score.value


def test_signatures_say_how_it_was_counted():
    scores = corpus_scores(HYPOTHESES, REFERENCES)
    version = f"version:{sacrebleu.__version__}"
    assert scores["bleu"].signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}"
    assert scores["chrf"].signature == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}"


def test_case_counts_in_bleu_but_not_in_the_papers_score():
    hypotheses, references = ["EIN Haus , das noch steht ."], ["Ein Haus, das noch steht."]
    assert corpus_scores(hypotheses, references)["bleu"].value < 99
    assert tokenised_bleu(hypotheses, references, "de").value == pytest.approx(100)


def test_the_papers_score_counts_moses_tokens_and_says_so():
    """Moses keeps "isn 't" in two tokens: one of seven is wrong, 6/7, 4/6, 2/5 and 1/4 of the n-grams are right."""
    score = tokenised_bleu(["it isn't a big dog ."], ["It isn't a small dog ."], "en")
    assert score.value == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    assert score.signature.startswith("lower-cased, sacremoses tokens of en|nrefs:1|")


def test_the_papers_score_knows_the_language_of_a_region_and_none_without_blanks():
    """French Moses has "l'" for a token, and English "l" and an apostrophe."""
    pair = (["il boit l'eau d'ici"], ["il boit l'air d'ici"])
    assert tokenised_bleu(*pair, "fr_FR") == tokenised_bleu(*pair, "fr") != tokenised_bleu(*pair, "en")
    assert tokenised_bleu(["我喜欢猫"], ["我喜欢狗"], "zh_CN") is None


def test_without_sacremoses_there_is_no_such_score(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokenised_bleu(HYPOTHESES, REFERENCES, "en") is None
