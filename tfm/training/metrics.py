"""Where numbers go: a line of JSON an event, TensorBoard, a progress bar or log lines, and `curves.draw_curves`.

An event is a dictionary with `step` and `kind` ("train", "validation", …); the rest are floats. `metrics.jsonl` is the
record, the others are views of it. Loss and nll are in nats per target token, perplexity is exp(nll), BLEU and chrF run
from 0 to 100, paddings are shares from 0 to 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tfm.config import InputError
from tfm.text import finite
from tfm.training.curves import draw_curves

if TYPE_CHECKING:
    from tfm.files import AnyPath

_log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
PICTURE_NAME = "curves.png"
SECONDS_BETWEEN_LOG_LINES = 30.0
SECONDS_BETWEEN_FLUSHES = 10.0  # of TensorBoard's file, each of which waits for the disk


class MetricsWriter:
    """Writes the events of one run into its directory; a context manager.

    What is in `metrics.jsonl` already is kept. The picture is drawn anew after each validation event and at the end.
    An object store such as gs:// cannot be appended to: there, files are written to a local directory, and copied whole
    at `publish`.

    Args:
      workdir: the run directory, which exists.
      total_steps: updates in the run, for the progress bar.
      first_step: updates that are done already; TensorBoard drops what it has of later ones.
      progress: show a bar on stderr if that is a terminal, otherwise a log line at most every half minute.

    Raises InputError naming the path where something cannot be written.
    """

    def __init__(self, workdir: AnyPath, *, total_steps: int, first_step: int = 0, progress: bool = True) -> None:
        self._workdir = workdir
        self._scratch = None if isinstance(workdir, Path) else tempfile.TemporaryDirectory(prefix="tfm-metrics-")
        self._folder = workdir if self._scratch is None else Path(self._scratch.name)
        self.path = self._folder / FILE_NAME
        self.picture = self._folder / PICTURE_NAME
        self._total_steps = total_steps
        self._first_step = first_step
        self._progress = progress
        self._resources = contextlib.ExitStack()
        self._bar: Any = None
        self._last_log_line = -math.inf

    def __enter__(self) -> MetricsWriter:
        if self._scratch is not None:
            self._resources.enter_context(self._scratch)
            with _naming(self._workdir / FILE_NAME, "read"):
                if (self._workdir / FILE_NAME).exists():
                    self.path.write_bytes((self._workdir / FILE_NAME).read_bytes())
        with _naming(self.path):
            _cut_torn_line(self.path)
            # Unbuffered: an event is one write, so that a killed run has either the whole line or none of it.
            self._file = self._resources.enter_context(open(self.path, "ab", buffering=0))
            board = _TensorBoard(self.path.parent / "tensorboard", self._first_step)
            self._board = self._resources.enter_context(contextlib.closing(board))
        if self._progress and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._resources.enter_context(logging_redirect_tqdm())
            self._bar = self._resources.enter_context(
                tqdm(total=self._total_steps, initial=self._first_step, unit="step", dynamic_ncols=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with self._resources, _naming(self.picture):
                self._draw()
                self.publish()
        else:
            # The error under way says what went wrong; a second one on closing, of the same full disk, would hide it.
            with contextlib.suppress(OSError, InputError), self._resources:
                self.publish()

    def write(self, event: Mapping[str, Any]) -> None:
        """Records one event: {"step": 10, "kind": "train", "loss": 5.1, …}; a number not finite is stored as null."""
        step, kind = int(event["step"]), str(event["kind"])
        numbers = {name: float(value) for name, value in event.items() if name not in ("step", "kind")}
        with _naming(self.path):
            self._append({"step": step, "kind": kind} | finite(numbers))
            self._board.write(step, {f"{kind}/{name}": value for name, value in numbers.items()})
        if kind == "validation":
            self._draw()
            self.publish()
        if self._progress:
            self._show(step, kind, numbers)

    def publish(self) -> None:
        """Copies what was written into the run directory, where that is an object store; else it is there already."""
        if self._scratch is None:
            return
        with _naming(self._workdir):
            self._board.flush()
            for file in sorted(path for path in self._folder.rglob("*") if path.is_file()):
                there = self._workdir / str(file.relative_to(self._folder))
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(file.read_bytes())

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):  # a disk that has just become full takes a part, and refuses the rest
                self._file.write(line[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def _draw(self) -> None:
        with _naming(self.picture):
            draw_curves(read_events(self.path), self.picture)

    def _show(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        if kind == "train" and self._bar is not None:
            self._bar.set_postfix_str(_summary(numbers), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if kind == "train" and step < self._total_steps and now - self._last_log_line < SECONDS_BETWEEN_LOG_LINES:
            return
        if kind == "train":
            self._last_log_line = now
            _log.info("step %d of %d: %s", step, self._total_steps, _summary(numbers))
        else:
            _log.info("step %d of %d, %s: %s", step, self._total_steps, kind, _summary(numbers))


class _TensorBoard:
    """TensorBoard's event file, written in the caller's own thread.

    tensorboardX's SummaryWriter writes in a thread which ends at the first error, and then blocks its caller for ever:
    a full disk would hang the run in place of ending it.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(exist_ok=True)
        # Two starts within a second would otherwise share a name, and the second would empty the first one's file.
        self._file = EventsWriter(str(directory / "events"), filename_suffix=f".{os.getpid()}.{first_step}")
        # What stands in older files after the step that was resumed from is void.
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        self._flushed = 0.0

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def read_events(path: AnyPath) -> Iterator[dict[str, Any]]:
    """The events of a `metrics.jsonl`, in order; null stands for a number that was not finite.

    Objects without `step` and `kind`, as someone may have added, are passed over. Raises InputError naming the file and
    the line that holds no object.
    """
    with _naming(path, "read"):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            if {"step", "kind"} <= event.keys():
                yield event
        elif number < len(lines):  # the last one, without its line end, is from a run that was killed while it wrote
            raise InputError(f"{path}:{number}: not an event of tfm: expected JSON with step and kind")


def _summary(numbers: Mapping[str, float]) -> str:
    """The numbers of an event that a reader watches, in words."""
    forms = {
        "loss": "loss {:.3f}",
        "perplexity": "perplexity {:.2f}",
        "bleu": "BLEU {:.2f}",
        "chrf": "chrF {:.2f}",
        "steps_per_second": "{:.2f} steps/s",
        "target_tokens_per_second": "{:,.0f} target tokens/s",
    }
    parts = [form.format(numbers[name]) for name, form in forms.items() if name in numbers]
    if numbers.get("skipped_steps"):
        parts.append(f"{numbers['skipped_steps']:.0f} steps skipped")
    return ", ".join(parts)


def _cut_torn_line(path: Path) -> None:
    """Takes away a last line without its end, which a machine that went down while it wrote leaves behind."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            _log.warning("%s: its last line was cut short (%d bytes); it is dropped", path, len(content) - whole)
            file.truncate(whole)


@contextlib.contextmanager
def _naming(path: AnyPath, verb: str = "written") -> Iterator[None]:
    """Turns an OSError into an InputError that names the path."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise InputError(
            f"{where}: cannot be {verb}: {error.strerror or error}; mend that and run the same command again"
        ) from error
