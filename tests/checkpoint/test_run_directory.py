"""The run directory: whose it is, what may be changed in it, and the log cut for a resumed run."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tfm.checkpoint import RunDirectory, truncate_metrics
from tfm.checkpoint.run_directory import differing_fields
from tfm.config import Config, ConfigError, InputError, fields_of, from_dict


def override(config: Config, **values) -> Config:
    """`config` with fields set by their dotted names, dots written as two underscores."""
    sections = config.to_dict()
    for name, value in values.items():
        section, field = name.split("__")
        sections[section][field] = value
    return from_dict(sections)


@pytest.mark.parametrize("place", ["missing/below", "empty", "prepared"])
def test_a_new_run_starts_in_a_directory_that_holds_nothing_of_another(tmp_path, place):
    if place != "missing/below":
        (tmp_path / place).mkdir()
    if place == "prepared":
        (tmp_path / place / "store").mkdir()
        (tmp_path / place / "train.log").write_text("started\n")
    config = override(Config(), model__d_model=64, data__corpus=("demo", "text:a.{lang};weight=2"))
    RunDirectory.create(tmp_path / place, config)
    assert RunDirectory.open(tmp_path / place).config == config


def test_what_the_config_itself_puts_into_the_directory_is_no_other_s(tmp_path):
    for name in ("tokens", "tokens.partial", "cache"):
        (tmp_path / name).mkdir()
    places = dict(data__store=str(tmp_path / "tokens"), data__cache_dir=str(tmp_path / "cache" / "below"))
    with pytest.raises(InputError, match=r"holds cache, tokens, tokens\.partial and no config\.json"):
        RunDirectory.create(tmp_path, Config())
    RunDirectory.create(tmp_path, override(Config(), **places))


def test_a_start_that_was_refused_leaves_room_for_the_right_config(tmp_path):
    run = RunDirectory.create(tmp_path, override(Config(), data__corpus=("text:typo",)))  # and then no such corpus
    assert RunDirectory.create(tmp_path, Config()).config == Config()
    run.tokenizer_path.write_bytes(b"prepared")  # and then no room for a step
    run.metrics_path.write_bytes(b"")
    run.checkpoints_path.mkdir()
    other = override(Config(), training__target_tokens_per_batch=1024)
    assert RunDirectory.create(tmp_path, other).config == other


def test_a_run_that_has_begun_has_its_config_until_the_other_is_adopted(tmp_path, caplog):
    caplog.set_level("INFO", "tfm")
    RunDirectory.create(tmp_path, Config()).metrics_path.write_bytes(b"{}\n")
    other = override(Config(), training__steps=7, mesh__tensor=3)
    run = RunDirectory.create(tmp_path, other)  # and then that mesh is refused
    assert run.config == Config()
    run.adopt(other)
    assert run.config == other
    assert caplog.text.count("the run goes on with training.steps=7, 100000 so far") == 1


def test_where_a_tokenizer_comes_from(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    assert run.brought_tokenizer(Config()) is None
    brought = tmp_path / "brought.model"
    brought.write_bytes(b"model")
    with_one = override(Config(), data__tokenizer=str(brought))
    assert run.brought_tokenizer(with_one) == brought
    run.install_tokenizer(brought)
    assert run.brought_tokenizer(with_one) == brought  # which may be another one by now: nothing depends on it yet
    brought.unlink()
    assert run.brought_tokenizer(with_one) == run.tokenizer_path
    tuned = RunDirectory.create(tmp_path / "tuned", Config())
    from_run = override(Config(), training__initialize_from=str(run.path))
    assert tuned.brought_tokenizer(from_run) == run.tokenizer_path
    tuned.install_tokenizer(run.tokenizer_path)
    tuned.metrics_path.write_bytes(b"{}\n")
    assert tuned.brought_tokenizer(from_run) == tuned.tokenizer_path


def test_a_run_of_another_config_is_refused_and_each_differing_field_named(tmp_path):
    RunDirectory.create(tmp_path, Config()).metrics_path.write_bytes(b"{}\n")
    written = (tmp_path / "config.json").read_bytes()
    other = override(Config(), model__d_model=256, optimizer__warmup_steps=10, decoding__beam_size=4)
    with pytest.raises(InputError) as refusal:
        RunDirectory.create(tmp_path, other)
    message = str(refusal.value)
    assert "model.d_model is 512 there and 256 now" in message
    assert "optimizer.warmup_steps is 4000 there and 10 now" in message
    assert "beam_size" not in message and "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == written


def test_what_changes_no_parameter_may_change_and_is_written_down(tmp_path):
    RunDirectory.create(tmp_path, Config())
    other = override(
        Config(), mesh__tensor=2, decoding__beam_size=4, training__steps=7, training__remat="full", data__store="/s"
    )
    assert RunDirectory.create(tmp_path, other).config == other


def test_every_field_is_either_allowed_to_change_or_refused():
    """A new field is refused until somebody decides otherwise."""
    changed = {}
    for name, value in fields_of(Config()).items():
        section, field = name.split(".")
        other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, tuple: lambda v: (*v, "x")}
        new = other.get(type(value), lambda v: "other")(value)
        part = dataclasses.replace(getattr(Config(), section), **{field: new})
        changed[name] = bool(differing_fields(Config(), dataclasses.replace(Config(), **{section: part})))
    assert not any(refused for name, refused in changed.items() if name.startswith(("mesh.", "decoding.")))
    assert all(refused for name, refused in changed.items() if name.startswith(("model.", "optimizer.")))
    may = {name for name, refused in changed.items() if not refused and name.startswith(("data.", "training."))}
    of_data = {"test_split", "store", "cache_dir", "read_ahead"}
    of_training = {"steps", "gradient_accumulation", "remat", "unroll_layers", "deterministic", "log_every"}
    of_training |= {"evaluate_every", "evaluate_sentences", "checkpoint_every", "keep_last", "keep_best"}
    of_training |= {"early_stopping", "max_skipped_steps"}
    assert may == {f"data.{name}" for name in of_data} | {f"training.{name}" for name in of_training}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_number_of_steps_stays_where_the_schedule_depends_on_it(schedule):
    config = override(Config(), optimizer__schedule=schedule)
    assert list(differing_fields(config, override(config, training__steps=5000))) == ["training.steps"]


def test_accumulation_stays_where_it_would_change_the_batch():
    config = Config()  # 96 rows
    assert not differing_fields(config, override(config, training__gradient_accumulation=4))
    assert list(differing_fields(config, override(config, training__gradient_accumulation=5))) == [
        "training.gradient_accumulation"
    ]


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"thesis\.tex and no config\.json"):
        RunDirectory.create(tmp_path, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_prepare_leaves_is_no_hindrance(tmp_path):
    (tmp_path / "store.partial").mkdir()
    RunDirectory.create(tmp_path, Config())
    assert (tmp_path / "config.json").exists()


def test_a_config_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 1}')
    with pytest.raises(ConfigError, match=r"config\.json"):
        RunDirectory.create(tmp_path, Config())


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/run"])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as refusal:
        RunDirectory.create(tmp_path / place, Config())
    assert str(tmp_path / place) in str(refusal.value)


def test_reading_where_no_run_is(tmp_path):
    with pytest.raises(InputError, match=r"no run \(no config\.json\)"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "checkpoints"])
def test_a_link_in_a_run_directory_is_refused(tmp_path, name):
    RunDirectory.create(tmp_path / "run", Config())
    outside = tmp_path / "outside"
    outside.write_bytes((tmp_path / "run" / "config.json").read_bytes())
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(outside)
    for opened in (
        lambda: RunDirectory.open(tmp_path / "run"),
        lambda: RunDirectory.create(tmp_path / "run", Config()),
    ):
        with pytest.raises(InputError, match=f"{name}: is a link"):
            opened()


def test_a_log_that_is_a_link_is_not_written(tmp_path):
    (tmp_path / "outside").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "outside")
    for opened in (RunDirectory.create, lambda path, _: truncate_metrics(path / "metrics.jsonl", 0)):
        with pytest.raises(InputError, match=r"metrics\.jsonl: is a link"):
            opened(tmp_path / "run", Config())


def test_a_tokenizer_is_installed_once(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Config())
    assert run.tokenizer_sha256() is None
    (tmp_path / "a.model").write_bytes(b"a")
    (tmp_path / "b.model").write_bytes(b"b")
    run.install_tokenizer(tmp_path / "b.model")
    run.install_tokenizer(tmp_path / "a.model")
    run.metrics_path.write_bytes(b"{}\n")
    run.install_tokenizer(tmp_path / "a.model")
    with pytest.raises(InputError, match="differs from"):
        run.install_tokenizer(tmp_path / "b.model")
    assert run.tokenizer_path.read_bytes() == b"a"


def test_the_log_is_cut_after_the_restored_step(tmp_path):
    log = tmp_path / "metrics.jsonl"
    events = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "bleu": 9.0},
        {"step": 30, "loss": 0.5},
    ]
    lines = [json.dumps(event).encode() + b"\n" for event in events]
    log.write_bytes(b"".join(lines) + b'{"step": 4')
    assert truncate_metrics(log, 20) == 2
    assert log.read_bytes() == b"".join(lines[:3])
    before = log.stat().st_mtime_ns
    assert truncate_metrics(log, 20) == 0
    assert log.stat().st_mtime_ns == before
    assert truncate_metrics(log, 0) == 3 and log.read_bytes() == b""
    assert truncate_metrics(tmp_path / "none", 20) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_while_the_log_is_cut_leaves_it_whole(tmp_path, monkeypatch):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        truncate_metrics(log, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert log.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_line_that_is_no_event_is_removed_and_named(tmp_path, caplog):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2{"step": 3}\n[1]\n{"step": 3, "text": "a\xe2\x80\xa8b"}\n')
    assert truncate_metrics(log, 5) == 2
    assert log.read_bytes() == b'{"step": 1}\n{"step": 3, "text": "a\xe2\x80\xa8b"}\n'
    assert "line 2" in caplog.text and "line 3" in caplog.text


def test_orbax_is_imported_once_it_is_used():
    """It takes a second, and `prepare` does without."""
    program = "import sys, tfm.checkpoint; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_one_process_at_a_time_trains_in_a_directory(tmp_path):
    """The second one changes nothing, not even fields that may change."""
    other = override(Config(), decoding__beam_size=8)
    with ExitStack() as first, ExitStack() as second:
        run = RunDirectory.create(tmp_path / "run", Config(), lock=first)
        with pytest.raises(InputError, match=r"run: another process is training in it: wait"):
            RunDirectory.create(tmp_path / "run", other, lock=second)
        assert run.config == Config()
    with ExitStack() as third:  # free again
        assert RunDirectory.create(tmp_path / "run", other, lock=third).config == other


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "notes")
    with ExitStack() as stack, pytest.raises(InputError, match=r"\.lock: is a link to"):
        RunDirectory.create(tmp_path / "run", Config(), lock=stack)
    assert (tmp_path / "notes").read_text() == "kept"


@pytest.mark.parametrize("act", [RunDirectory.open, lambda path: RunDirectory.create(path, Config())])
def test_an_object_store_without_its_client_is_one_line(monkeypatch, act):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it isn't installed
    with pytest.raises(InputError, match=r"^gs://bucket/run: cannot be reached .*pip install"):
        act("gs://bucket/run")


def test_a_disk_without_locks_is_no_hindrance(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with ExitStack() as stack:
        RunDirectory.create(tmp_path / "run", Config(), lock=stack)
    assert "cannot be locked" in caplog.text


def test_a_run_with_checkpoints_has_begun(copy):
    assert not copy.metrics_path.exists() and copy.has_begun()
