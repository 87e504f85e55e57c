"""Scores of given translations: of each line its own, and a piece that is none named with its line."""

import jax
import numpy as np
import pytest

from tests.decoding.lines import WORDS
from tfm.config import InputError


def test_scores_keep_to_their_lines(translator, caplog):
    sources = ["haus tür", "", "baum", "weg"]
    targets = ["tür", "haus", "", " ".join(WORDS * 20)]
    scored = translator.score(sources, targets)
    assert [np.isfinite(one.log_prob) for one in scored] == [True, True, True, False]
    assert scored[2].tokens == () and len(scored[2].token_log_probs) == 1
    assert caplog.messages[0].startswith("line 4 has ")
    assert translator.score(sources[:1], targets[:1]) == scored[:1]


def test_a_broken_model_s_scores_are_said_to_mean_nothing(translator, parameters, caplog):
    try:
        translator.set_parameters(jax.tree.map(lambda p: p * np.nan, parameters))
        assert np.isnan(translator.score(["", "haus"], ["", "tür"])[1].log_prob)
    finally:
        translator.set_parameters(parameters)
    assert caplog.messages == ["line 2: the model gives no probabilities: its score means nothing"]


@pytest.mark.parametrize("piece", ["no such piece", "<s>", "\ud800", 3])
def test_a_piece_that_is_none_is_named_with_its_line(translator, piece):
    with pytest.raises(InputError, match=r"line 2: .* is no piece of this tokenizer"):
        translator.score(["haus", "tür"], ["haus", [piece]])
