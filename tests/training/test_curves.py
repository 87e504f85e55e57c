from matplotlib.figure import Figure

from tfm.training.curves import draw_curves


def test_the_picture_shows_the_numbers(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    events = [
        {"step": 10, "kind": "train", "loss": 0.9, "nll": 0.8, "learning_rate": 1e-3},
        {"step": 20, "kind": "train", "loss": 0.9, "nll": None, "learning_rate": 1e-3},
        {"step": 20, "kind": "validation", "nll": 2.0, "bleu": 31.0, "chrf": 55.0},
    ]
    draw_curves(events, tmp_path / "curves.png")
    curves = {
        line.get_label(): list(zip(*line.get_data(), strict=True)) for axes in drawn[0].axes for line in axes.lines
    }
    assert curves["training"] == [(10, 0.8)]  # the number that was not finite is left out
    assert curves["validation"] == [(20, 2.0)]
    assert curves["BLEU"] == [(20, 31.0)]
    assert curves["chrF"] == [(20, 55.0)]
    assert curves["learning rate"] == [(10, 1e-3), (20, 1e-3)]
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in drawn[0].axes)
