import io
import json
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tfm.config import InputError
from tfm.training import metrics
from tfm.training.metrics import MetricsWriter, read_events


@pytest.fixture
def undrawn(monkeypatch):
    """For what is not about the picture, which takes the better part of a second."""
    monkeypatch.setattr(metrics, "draw_curves", lambda events, picture: None)


def training_event(step: int, **more: float) -> dict:
    numbers = {"loss": 9.0 / step, "nll": 8.0 / step, "perplexity": 20.0, "gradient_norm": 1.5, "learning_rate": 1e-3}
    return {"step": step, "kind": "train", "steps_per_second": 2.5, "target_tokens_per_second": 1234.0} | numbers | more


def validation_event(step: int) -> dict:
    return {"step": step, "kind": "validation", "loss": 3.0, "nll": 2.0, "perplexity": 7.4, "bleu": 31.0, "chrf": 55.0}


def lines_of(workdir: Path) -> list[dict]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (workdir / "metrics.jsonl").read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.split(b"\n")[:-1]]


@pytest.mark.usefixtures("undrawn")
def test_each_event_is_one_line_at_once(tmp_path):
    with MetricsWriter(tmp_path, total_steps=20) as writer:
        for step in (10, 20):
            writer.write(training_event(step))
            assert lines_of(tmp_path)[-1] == training_event(step)  # on disk before the writer is closed
        writer.write(validation_event(20))
    assert lines_of(tmp_path) == [training_event(10), training_event(20), validation_event(20)]
    assert list(read_events(tmp_path / "metrics.jsonl")) == lines_of(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_numbers_of_numpy_are_written_and_those_not_finite_are_null(tmp_path):
    odd = {"loss": np.float32("nan"), "gradient_norm": float("inf"), "learning_rate": np.float32(0.5)}
    with MetricsWriter(tmp_path, total_steps=1) as writer:
        writer.write({"step": np.int64(1), "kind": "train"} | odd)
    assert lines_of(tmp_path) == [
        {"step": 1, "kind": "train", "loss": None, "gradient_norm": None, "learning_rate": 0.5}
    ]


@pytest.mark.usefixtures("undrawn")
def test_what_is_there_is_kept(tmp_path):
    with MetricsWriter(tmp_path, total_steps=20) as writer:
        writer.write(training_event(10))
    with MetricsWriter(tmp_path, total_steps=20, first_step=10) as writer:
        writer.write(training_event(20))
    assert [event["step"] for event in lines_of(tmp_path)] == [10, 20]


@pytest.mark.usefixtures("undrawn")
def test_a_torn_last_line_is_cut_before_the_next_is_added(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(training_event(10)).encode() + b'\n{"step": 2')
    assert [event["step"] for event in read_events(path)] == [10]
    with MetricsWriter(tmp_path, total_steps=20, first_step=10) as writer:
        writer.write(training_event(20))
    assert [event["step"] for event in lines_of(tmp_path)] == [10, 20]
    assert "cut short (10 bytes)" in caplog.text


def test_an_object_that_is_no_event_is_passed_over(tmp_path):
    """Someone's note, which a resumed run keeps."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"note": "a colder room"}\n{"step": 1, "kind": "train"}\n{"kind": "train"}\n')
    assert list(read_events(path)) == [{"step": 1, "kind": "train"}]


@pytest.mark.parametrize("line", [b"nonsense", b"[1, 2]"])
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not an event"):
        list(read_events(path))


@pytest.mark.usefixtures("undrawn")
def test_tensorboard_has_every_number_and_drops_what_a_resume_repeats(tmp_path, monkeypatch):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    def read(path: Path) -> list[Event]:
        content, events = path.read_bytes(), []
        while content:  # TFRecord: length, its checksum, data, its checksum
            length = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
        return events

    with MetricsWriter(tmp_path, total_steps=30) as writer:
        writer.write(training_event(10))
        writer.write(validation_event(10))
    (first,) = (tmp_path / "tensorboard").iterdir()
    values = {v.tag: v.simple_value for event in read(first) for v in event.summary.value}
    assert values["train/learning_rate"] == pytest.approx(1e-3)
    assert values["validation/bleu"] == 31.0

    # Resumed, and begun anew after a kill that left no checkpoint: what was logged from there on is void.
    for step in (10, 0):
        before = set((tmp_path / "tensorboard").iterdir())
        monkeypatch.setattr(os, "getpid", lambda step=step: 10**6 + step)  # each start is another process
        with MetricsWriter(tmp_path, total_steps=30, first_step=step) as writer:
            writer.write(training_event(step + 10))
        (new,) = set((tmp_path / "tensorboard").iterdir()) - before
        starts = [event.step for event in read(new) if event.session_log.status == SessionLog.START]
        assert starts == [step + 1]


def test_the_picture_is_a_png_and_no_unfinished_one_is_left(tmp_path):
    with MetricsWriter(tmp_path, total_steps=20) as writer:
        writer.write(training_event(10))
        assert not (tmp_path / "curves.png").exists()
        writer.write(validation_event(10))
        early = (tmp_path / "curves.png").read_bytes()
        writer.write(training_event(20, loss=float("nan")))
    late = (tmp_path / "curves.png").read_bytes()
    assert early.startswith(b"\x89PNG") and late.startswith(b"\x89PNG")
    assert early != late  # drawn once more at the end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl", "tensorboard"]


def test_a_run_that_has_logged_nothing_still_gets_its_picture(tmp_path):
    with MetricsWriter(tmp_path, total_steps=1):
        pass
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_without_a_terminal_there_is_a_log_line_now_and_then(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    seconds = 0.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: seconds, time=lambda: seconds))
    with MetricsWriter(tmp_path, total_steps=100) as writer:
        for step in range(1, 101):
            seconds += 1.0
            writer.write(training_event(step))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines] == ["1", "31", "61", "91", "100"]
    assert lines[0] == "step 1 of 100: loss 9.000, perplexity 20.00, 2.50 steps/s, 1,234 target tokens/s"
    assert sys.stderr.getvalue() == ""


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_is_always_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with MetricsWriter(tmp_path, total_steps=100) as writer:
        writer.write(validation_event(50))
    assert "step 50 of 100, validation: loss 3.000, perplexity 7.40, BLEU 31.00, chrF 55.00" in caplog.messages


@pytest.mark.usefixtures("undrawn")
def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricsWriter(tmp_path, total_steps=40, first_step=20) as writer:
        writer.write(training_event(30))
        writer.write(training_event(40))
    last = terminal.getvalue().split("\r")[-1]
    assert "40/40" in last
    assert "1,234 target tokens/s" in last
    assert "20/40" in terminal.getvalue()


@pytest.mark.usefixtures("undrawn")
def test_progress_can_be_off(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with MetricsWriter(tmp_path, total_steps=40, progress=False) as writer:
        writer.write(training_event(40))
    assert caplog.messages == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with (
        pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written: Is a directory"),
        MetricsWriter(tmp_path, total_steps=1),
    ):
        pass


def test_an_error_of_the_run_is_not_replaced_by_one_of_closing(tmp_path):
    with pytest.raises(KeyError, match="the run"), MetricsWriter(tmp_path, total_steps=1) as writer:
        os.close(writer._file.fileno())
        raise KeyError("the run")


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path):
    """The limit on a file's size stands for the disk: the kernel takes a part of the line and refuses the rest."""
    script = f"""
        import resource, signal
        from pathlib import Path
        from tfm.config import InputError
        from tfm.training.metrics import MetricsWriter

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with MetricsWriter(Path({str(tmp_path)!r}), total_steps=1000) as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
                for step in range(1, 1000):
                    writer.write({{"step": step, "kind": "train", "loss": 1.0 / step}})
        except InputError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "cannot be written: File too large" in run.stdout
    assert str(tmp_path) in run.stdout
    steps = [event["step"] for event in lines_of(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 5
