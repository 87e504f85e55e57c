"""The loop: when numbers are read, when it ends, what it starts from, and what it refuses."""

import dataclasses
import logging
import os
import re
import shutil
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from tfm import hosts
from tfm.checkpoint import CheckpointReader, RunDirectory, run_directory
from tfm.checkpoint.reader import ranked
from tfm.commands import train as train_command
from tfm.config import Config, ConfigError, InputError
from tfm.training import loop
from tfm.training.loop import Run, train
from tfm.training.metrics import read_events

pytestmark = pytest.mark.usefixtures("one_device")


def started(config, workdir, stack):
    return Run(config, RunDirectory.create(workdir, config.validate()), stack)


def logged(workdir, kind="train"):
    return [event for event in read_events(Path(workdir) / "metrics.jsonl") if event["kind"] == kind]


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


@pytest.fixture
def quiet_evaluation(monkeypatch):
    """Evaluation without its compilations: `scores` of each, in order; the last stays."""
    scores = []

    def evaluate(run):
        return {"loss": 1.0, "bleu": scores.pop(0) if len(scores) > 1 else scores[0]}

    monkeypatch.setattr(Run, "_scores", evaluate)
    return scores


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


def count_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def best_and_kept(workdir: Path) -> tuple[list[int], list[int]]:
    reader = CheckpointReader(RunDirectory.open(workdir))
    return ranked(reader._known()), reader.steps()


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    """A whole run with everything real, on fewer pairs than a batch has rows; what it warned of stands beside it."""
    folder = tmp_path_factory.mktemp("finished")
    for split, sentences in {"train": ["one two", "three four", "five"], "validation": ["two one"]}.items():
        for language in ("en", "de"):
            (folder / f"{split}.{language}").write_text("".join(f"{sentence}\n" for sentence in sentences))
    config = tiny_config(
        {
            **{"data.corpus": (f"text:{folder}/{{split}}.{{lang}}",), "optimizer.ema_decay": 0.5},
            **{"training.steps": 3, "training.evaluate_every": 3},
        }
    )
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("tfm").addHandler(handler)
    make_mesh = loop.sharding.make_mesh
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
            assert train(config, folder / "run") == 0
    finally:
        logging.getLogger("tfm").removeHandler(handler)
    (folder / "warnings").write_text("\n".join(messages))
    return folder / "run"


def test_a_corpus_smaller_than_a_batch_trains_with_a_warning(finished):
    warnings = (finished.parent / "warnings").read_text()
    assert re.search("split train fills [12] rows, and a batch has 8", warnings)
    assert [event["step"] for event in logged(finished)] == [1, 2, 3]
    assert all(np.isfinite(event["loss"]) for event in logged(finished))
    [validation] = logged(finished, "validation")
    assert {"step", "loss", "nll", "perplexity", "bleu", "chrf"} <= validation.keys()
    assert validation["perplexity"] == pytest.approx(np.exp(validation["nll"]))


def test_validation_is_of_the_averaged_parameters(finished, tmp_path):
    """Also its loss, over all pairs; and their copy for translating is given back, or the next step would lack room."""
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    with ExitStack() as stack:
        run = Run(RunDirectory.open(workdir).config, RunDirectory.open(workdir), stack)
        with jax.set_mesh(run.mesh):
            losses = {}
            for name in ("parameters", "ema"):
                batch = run.validation.global_batch(0, loop.sharding.batch_sharding(run.mesh))
                sums = run.trainer.evaluation_step(getattr(run.state, name), batch)
                losses[name] = float(sums.loss) / float(sums.tokens)
            [validation] = logged(workdir, "validation")
            assert validation["loss"] == pytest.approx(losses["ema"]) != pytest.approx(losses["parameters"])
            before = sum(x.nbytes for x in jax.live_arrays())
            assert run._scores()["loss"] == validation["loss"]
            assert sum(x.nbytes for x in jax.live_arrays()) - before < count_bytes(run.state.ema) / 2


def test_a_directory_with_a_run_of_another_config_is_refused(finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = RunDirectory.open(workdir).config
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=64))
    with pytest.raises(InputError, match=r"run: holds a run of another config: model.d_ff is 32 there and 64 now"):
        train(other, workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == files


def test_starting_from_another_run_takes_its_averaged_parameters_and_its_tokenizer(finished, tiny_config, tmp_path):
    config = tiny_config({"training.initialize_from": str(finished), "optimizer.ema_decay": 0.9})
    other = RunDirectory.open(finished)
    with ExitStack() as stack:
        run = started(config, tmp_path / "run", stack)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state.parameters)
        averaged = CheckpointReader(other).restore_parameters(like).state
        for mine in (run.state.parameters, run.state.ema):
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(averaged), strict=True):
                assert np.array_equal(a, b)
        assert int(run.state.step) == 0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(run.state.optimizer))
        assert run.run.tokenizer_path.read_bytes() == other.tokenizer_path.read_bytes()


def test_another_tokenizer_than_that_of_the_run_started_from_is_refused(finished, tiny_config, tmp_path):
    tokenizer = str(finished / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"initialize_from=.* brings its own tokenizer, and data.tokenizer="):
        tiny_config({"training.initialize_from": str(finished), "data.tokenizer": tokenizer})
    config = tiny_config({"training.initialize_from": str(finished), "data.store": str(tmp_path / "store")})
    loop.prepare(tiny_config(), tmp_path / "store")  # with a tokenizer of its own
    with pytest.raises(InputError, match=r"store: holds a token store prepared otherwise \(data.tokenizer="):
        train(config, tmp_path / "other")


def test_another_activation_than_that_of_the_run_started_from_is_refused(finished, tiny_config, tmp_path):
    """All else of a model shows in the shapes of its parameters."""
    config = tiny_config({"training.initialize_from": str(finished), "model.activation": "gelu"})
    with pytest.raises(InputError, match=r"was trained with model.activation=relu, and this run has gelu"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "others_see_it", "message"),
    [
        ("run", True, "run: holds no config.json here, and does on host 0: give all hosts one directory"),
        ("made", False, "made: another host does not see it: give all of them one directory"),
    ],
)
def test_a_run_directory_that_a_host_does_not_see_is_named(tmp_path, monkeypatch, name, others_see_it, message):
    RunDirectory.create(tmp_path / "made", Config())
    monkeypatch.setattr(loop, "_SECONDS_TO_BE_SEEN", 0.0)
    monkeypatch.setattr(hosts, "all_agree", lambda good: good and others_see_it)
    with pytest.raises(InputError, match=message):
        loop._refuse_unshared(RunDirectory(tmp_path / name))


def test_a_beam_of_validation_that_is_too_large_is_named(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"training.evaluate_beam_size=2000 is more than the \d+ tokens"):
        train(tiny_config({"training.evaluate_beam_size": 2000}), tmp_path / "run")


def test_a_tokenizer_that_was_brought_along_may_be_moved_once_the_run_has_it(finished, tiny_config, tmp_path):
    brought = Path(shutil.copy(finished / "tokenizer.model", tmp_path / "brought.model"))
    config = tiny_config({"data.tokenizer": str(brought)})
    with ExitStack() as stack:
        started(config, tmp_path / "run", stack)
    brought.unlink()
    with ExitStack() as stack:
        run = started(config, tmp_path / "run", stack)
        assert run.run.tokenizer_path.read_bytes() == (finished / "tokenizer.model").read_bytes()


def test_an_evaluation_that_is_not_finite_is_saved_and_is_not_the_best(finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    with ExitStack() as stack:
        run = Run(RunDirectory.open(workdir).config, RunDirectory.open(workdir), stack)
        step = int(run.state.step) + 1
        run._save(step)
        run._note(step, {"loss": float("inf"), "perplexity": float("inf"), "bleu": float("nan"), "chrf": 0.0})
        assert best_and_kept(workdir) == ([3], [3, step])


def test_a_log_that_is_gone_is_begun_anew(finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "metrics.jsonl").unlink()
    assert train(RunDirectory.open(workdir).config, workdir) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == b""


def test_hosts_but_the_first_do_not_look_at_the_log(finished, tmp_path, monkeypatch):
    """They may be sooner than the first is in making it."""
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    with ExitStack() as stack:
        run = started(RunDirectory.open(workdir).config, workdir, stack)
        assert len(run._logged()) == 4
        monkeypatch.setattr(loop.hosts, "is_first", lambda: False)
        assert run._logged() == []


def test_a_run_directory_on_an_object_store(finished, tmp_path, quiet_evaluation, monkeypatch):
    """A local directory behind the interface that gs:// has: no pathlib.Path, and nothing that can be appended to."""
    quiet_evaluation += [1.0]
    bucket = tmp_path / "bucket"
    bucket.mkdir()

    def as_path(path):
        name = os.fspath(path)
        return epath.Path(str(bucket / name.removeprefix("gs://"))) if name.startswith("gs://") else Path(path)

    monkeypatch.setattr(run_directory, "as_path", as_path)
    source = RunDirectory.open(finished).config
    config = dataclasses.replace(
        source,
        data=dataclasses.replace(source.data, store=str(tmp_path / "store")),
        training=dataclasses.replace(source.training, checkpoint_every=2),
    )
    assert train(config, "gs://runs/one") == 0
    there = bucket / "runs" / "one"
    assert logged(there)[-1]["step"] == 3 and len(logged(there, "validation")) == 1
    assert (there / "curves.png").read_bytes().startswith(b"\x89PNG") and list((there / "tensorboard").iterdir())
    assert [event["loss"] for event in logged(there)] == [event["loss"] for event in logged(finished)]
    shutil.rmtree(there / "checkpoints" / "3")
    assert train(config, "gs://runs/one") == 0  # from step 2 on
    assert [event["step"] for event in logged(there)] == [1, 2, 3]
