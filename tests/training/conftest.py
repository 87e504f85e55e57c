import pytest

from tfm.training.loop import Run


@pytest.fixture
def quiet_evaluation(monkeypatch):
    """Evaluation without its compilations: `scores` of each, in order; the last stays."""
    scores = []

    def evaluate(run):
        return {"loss": 1.0, "bleu": scores.pop(0) if len(scores) > 1 else scores[0]}

    monkeypatch.setattr(Run, "_scores", evaluate)
    return scores
