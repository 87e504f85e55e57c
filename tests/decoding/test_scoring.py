"""Scores of given translations: of each line its own, and a piece that is none named with its line."""

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


@pytest.mark.parametrize("piece", ["no such piece", "<s>", "\ud800", 3])
def test_a_piece_that_is_none_is_named_with_its_line(translator, piece):
    with pytest.raises(InputError, match=r"line 2: .* is no piece of this tokenizer"):
        translator.score(["haus", "tür"], ["haus", [piece]])
