"""What the loop starts from: a run of its own, another one, a directory of several hosts or of an object store."""

import dataclasses
import logging
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from tests.training.runs import best_and_kept, logged, started
from tfm import hosts
from tfm.checkpoint import CheckpointReader, RunDirectory, run_directory
from tfm.config import Config, ConfigError, InputError
from tfm.training import loop
from tfm.training.loop import Run, train

pytestmark = pytest.mark.usefixtures("one_device")


def count_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


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
    ("index", "message"),
    [
        (1, "run: is another directory than host 0 has under that name: give all hosts one directory"),
        (0, "run: another host does not see it: give all of them one directory"),
    ],
)
def test_a_run_directory_that_a_host_does_not_see_is_named(tmp_path, monkeypatch, index, message):
    """Though there is a copy of the run under that name, on a disk of its own."""
    run = RunDirectory.create(tmp_path / "run", Config())
    before = set(run.path.iterdir())
    monkeypatch.setattr(hosts, "_SEEN_WITHIN", 0.0)
    for name, value in {"count": lambda: 2, "index": lambda: index, "agreed": lambda value: value}.items():
        monkeypatch.setattr(hosts, name, value)
    monkeypatch.setattr(hosts, "first_does", lambda work: work() if index == 0 else None)
    monkeypatch.setattr(hosts, "all_agree", lambda good: good and index != 0)
    with pytest.raises(InputError, match=message):
        loop._refuse_unshared(run)
    assert set(run.path.iterdir()) == before


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


def test_a_run_does_not_go_on_with_other_data(trained, tiny_config, tmp_path, quiet_evaluation):
    quiet_evaluation.append(1.0)
    for split in ("train", "validation"):
        for language in ("en", "de"):
            (tmp_path / f"{split}.{language}").write_text("one two\nthree four\n")
    own = {"data.corpus": (f"text:{tmp_path}/{{split}}.{{lang}}",), "data.tokenizer": str(trained / "tokenizer.model")}
    config = tiny_config({**own, "training.steps": 1})
    assert train(config, tmp_path / "run") == 0
    (tmp_path / "train.en").write_text("one two\nthree five\n")
    shutil.rmtree(tmp_path / "run" / "store")
    with pytest.raises(InputError, match="the data is not what the checkpoint was trained on"):
        train(config, tmp_path / "run")


def test_a_run_from_another_s_averages_and_validates_as_its_config_says(finished, tiny_config, tmp_path, monkeypatch):
    start = {"training.initialize_from": str(finished), "optimizer.ema_decay": 0.9}
    config = tiny_config({**start, "decoding.beam_size": 3, "training.steps": 1})
    scored = []
    monkeypatch.setattr(loop, "corpus_scores", lambda found, references, _: scored.append((found, references)) or {})
    with ExitStack() as stack:
        run = started(config, tmp_path / "run", stack)
        assert run.translator.config == config.validation_decoding != config.decoding
        assert run.go() == 0
    [(found, references)] = scored
    assert list(references) == [reference for _, reference in run.validation_text] != list(found)


def test_the_curves_of_a_resumed_run_go_on(tiny_config, tmp_path, quiet_evaluation):
    quiet_evaluation.append(1.0)
    for steps in (2, 3):
        assert train(tiny_config({"training.steps": steps}), tmp_path / "run") == 0
    files = (tmp_path / "run" / "tensorboard").iterdir()
    assert {path.name.rpartition(".")[2] for path in files} == {"0", "2"}
