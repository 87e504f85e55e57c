"""The loop: when numbers are read, when it ends, and which steps are the best."""

import logging
import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack

import pytest

from tests.training.runs import best_and_kept, logged, started
from tfm.checkpoint import CheckpointReader, RunDirectory
from tfm.commands import train as train_command
from tfm.training.loop import Run, train

pytestmark = pytest.mark.usefixtures("one_device")


class Read(Mapping):
    """Metrics of a step that tell when one of them is looked at."""

    def __init__(self, metrics, tell):
        self.metrics, self.tell = metrics, tell

    def __getitem__(self, name):
        self.tell()
        return self.metrics[name]

    def __iter__(self):
        return iter(self.metrics)

    def __len__(self):
        return len(self.metrics)


def watch(run, order, before=lambda step: None):
    """Notes in `order` when each step is sent to the device, and when its numbers are first read."""
    train_step = run.trainer.train_step

    def send(state, batch):
        step = run.first_step + sum(what == "sent" for what, _ in order) + 1
        before(step)
        order.append(("sent", step))
        state, metrics = train_step(state, batch)
        return state, Read(metrics, lambda: ("read", step) in order or order.append(("read", step)))

    run.trainer.train_step = send


def test_numbers_of_a_step_are_read_after_the_next_one_is_sent(tiny_config, tmp_path, quiet_evaluation):
    quiet_evaluation.append(1.0)
    order = []
    with ExitStack() as stack:
        run = started(tiny_config({"training.steps": 7, "training.checkpoint_every": 4}), tmp_path / "run", stack)
        train_step = run.trainer.train_step
        watch(run, order)
        assert run.go() == 0
    assert train_step._cache_size() == 1  # compiled once, whatever came between
    sent, read = "sent", "read"
    assert order == [
        *[(sent, 1), (sent, 2), (read, 1), (sent, 3), (read, 2), (sent, 4), (read, 3), (read, 4)],  # a checkpoint
        *[(sent, 5), (sent, 6), (read, 5), (sent, 7), (read, 6), (read, 7)],
    ]
    assert [event["step"] for event in logged(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_early_stopping_and_the_same_command_again(tiny_config, tmp_path, quiet_evaluation, caplog):
    quiet_evaluation += [3.0, 5.0, 4.0, 5.0, 9.0]
    config = tiny_config({"training.steps": 50, "training.evaluate_every": 2, "training.early_stopping": 2})
    caplog.set_level(logging.INFO, "tfm")
    assert train(config, tmp_path / "run") == 0
    assert "2 evaluations without a better bleu: the run ends early" in caplog.text
    assert caplog.text.count(" tokenizer: ") == 1  # what was found in the corpus, and dropped from it
    assert [event["bleu"] for event in logged(tmp_path / "run", "validation")] == [3, 5, 4, 5]
    caplog.clear()
    assert train(config, tmp_path / "run") == 0  # it has ended, and does not go on
    assert "the run ends early" in caplog.text and logged(tmp_path / "run")[-1]["step"] == 8


def test_of_losses_the_lowest_is_the_best(tiny_config, tmp_path, monkeypatch):
    """And one that is not finite is the worst, for early stopping as well."""
    losses = [3.0, float("nan"), 1.0, 2.0, float("nan"), 0.5]
    monkeypatch.setattr(Run, "_scores", lambda run: {"loss": losses.pop(0), "bleu": float(len(losses))})
    config = tiny_config(
        {
            **{"training.steps": 50, "training.evaluate_every": 2, "training.early_stopping": 2},
            **{"training.best_metric": "loss", "training.keep_last": 5},
        }
    )
    assert train(config, tmp_path / "run") == 0
    assert [event["loss"] for event in logged(tmp_path / "run", "validation")] == [3, None, 1, 2, None]
    assert best_and_kept(tmp_path / "run") == ([6, 8, 2], [2, 4, 6, 8, 10])


def test_too_many_skipped_steps_end_the_run(tiny_config, tmp_path, caplog):
    config = tiny_config(
        {
            **{"optimizer.learning_rate": 1e38, "optimizer.warmup_steps": 1, "training.max_skipped_steps": 3},
            **{"training.checkpoint_every": 2, "model.norm": "post"},
        }
    )
    path = tmp_path / "bad.py"
    path.write_text(
        f"from pathlib import Path\nfrom tfm.config import from_json\n"
        f"def get_config():\n    return from_json(Path({str(tmp_path / 'bad.json')!r}))\n"
    )
    (tmp_path / "bad.json").write_text(config.to_json())
    assert train_command.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert "step 2: the loss or its gradient is not finite; the update was skipped" in caplog.text
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert message.startswith("step 4: 3 updates in a row were not finite")
    assert "the last good checkpoint: step 2" in message
    events = logged(tmp_path / "run")
    assert [event["skipped_steps"] for event in events] == [0, 1, 2, 3]
    assert events[0]["loss"] is not None and events[1]["gradient_norm"] is None
    restored = CheckpointReader(RunDirectory.open(tmp_path / "run")).steps()
    assert restored == [2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step(tiny_config, tmp_path, quiet_evaluation, number, status):
    quiet_evaluation.append(1.0)
    before = signal.getsignal(number)
    with ExitStack() as stack:
        run = started(tiny_config(), tmp_path / "run", stack)
        watch(run, [], before=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
        assert run.go() == status
    assert signal.getsignal(number) is before
    assert [event["step"] for event in logged(tmp_path / "run")] == [1, 2, 3]
    assert CheckpointReader(RunDirectory.open(tmp_path / "run")).steps() == [3]


def test_a_signal_at_the_last_step_does_not_cost_its_evaluation(tiny_config, tmp_path, quiet_evaluation):
    quiet_evaluation.append(7.0)
    config = tiny_config({"training.steps": 2})
    with ExitStack() as stack:
        run = started(config, tmp_path / "run", stack)
        watch(run, [], before=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
        assert run.go() == 143
    assert logged(tmp_path / "run", "validation") == []
    assert train(config, tmp_path / "run") == 0
    assert [(event["step"], event["bleu"]) for event in logged(tmp_path / "run", "validation")] == [(2, 7)]
    assert train(config, tmp_path / "run") == 0  # once
    assert len(logged(tmp_path / "run", "validation")) == 1


def test_an_evaluation_that_fails_or_is_cut_off_costs_no_step_and_no_place_among_the_best(
    tiny_config, tmp_path, monkeypatch
):
    bleu = {2: 5.0, 4: 9.0, 6: 7.0, 8: 6.0}
    fate = {}

    def evaluate(run):
        step = int(run.state.step)
        if step in fate:
            fate.pop(step)()
        return {"loss": 1.0, "bleu": bleu[step]}

    def fail():
        raise RuntimeError("no room")

    def tell_to_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was waited out")

    monkeypatch.setattr(Run, "_scores", evaluate)
    config = tiny_config({"training.steps": 8, "training.evaluate_every": 2, "training.keep_last": 1})
    assert train(config, tmp_path / "undisturbed") == 0
    fate |= {2: fail, 4: tell_to_stop}
    with pytest.raises(RuntimeError, match="no room"):
        train(config, tmp_path / "run")
    assert best_and_kept(tmp_path / "run") == ([], [2])
    assert train(config, tmp_path / "run") == 143
    assert best_and_kept(tmp_path / "run") == ([2], [2, 4])
    assert train(config, tmp_path / "run") == 0
    assert best_and_kept(tmp_path / "run") == best_and_kept(tmp_path / "undisturbed") == ([4, 8], [4, 8])
    assert logged(tmp_path / "run", "validation") == logged(tmp_path / "undisturbed", "validation")


def test_a_kill_between_the_log_and_the_checkpoint_loses_no_score(tiny_config, tmp_path, quiet_evaluation, monkeypatch):
    quiet_evaluation += [9.0, 8.0]
    config = tiny_config({"training.steps": 4, "training.evaluate_every": 2})
    with monkeypatch.context() as killed:
        killed.setattr(Run, "_note", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train(config, tmp_path / "run")
    assert best_and_kept(tmp_path / "run") == ([], [2])
    assert train(config, tmp_path / "run") == 0
    assert [(event["step"], event["bleu"]) for event in logged(tmp_path / "run", "validation")] == [(2, 9), (4, 8)]
    assert best_and_kept(tmp_path / "run") == ([2, 4], [2, 4])


def test_a_signal_ends_an_evaluation_that_the_next_start_makes_up_for(tiny_config, tmp_path, monkeypatch):
    """A machine that is taken away gives half a minute, and an evaluation may take longer."""
    scores = []

    def evaluate(run):
        if not scores:
            scores.append(5.0)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal was waited out")
        return {"loss": 1.0, "bleu": scores[0]}

    monkeypatch.setattr(Run, "_scores", evaluate)
    config = tiny_config({"training.steps": 3, "training.evaluate_every": 2})
    assert train(config, tmp_path / "run") == 143
    assert CheckpointReader(RunDirectory.open(tmp_path / "run")).steps() == [2]
    assert logged(tmp_path / "run", "validation") == []
    assert train(config, tmp_path / "run") == 0
    assert [event["step"] for event in logged(tmp_path / "run", "validation")] == [2, 3]
