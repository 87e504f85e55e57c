"""Lines in and out of files: whole ones, whatever happens."""

import errno
import gzip
import io
import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tfm.commands.lines import (
    STANDARD_STREAM,
    Output,
    check_outputs,
    check_writable,
    json_line,
    opened,
    raw_lines,
    text_lines,
    write_text,
)
from tfm.config import InputError


def test_lines_end_at_a_newline_and_nowhere_else():
    content = "a\u2028b\n\n".encode() + b" c\x85\rd \n" + b"\xff\0\nlast"
    expected = ["a\u2028b", "", " c\ufffd\rd ", "\ufffd\0", "last"]
    assert list(text_lines(raw_lines(io.BytesIO(content)))) == expected
    assert list(text_lines(raw_lines(Drip(content)))) == expected
    assert list(raw_lines(io.BytesIO(b""))) == [] and list(raw_lines(io.BytesIO(b"\n\n"))) == [b"", b""]


@pytest.mark.parametrize("block", [3, 1 << 16])
def test_a_byte_order_mark_is_no_part_of_the_first_line(block):
    content = b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n"
    file = Drip(content) if block == 3 else io.BytesIO(content)
    assert list(raw_lines(file)) == [b"a", b"\xef\xbb\xbfb"]


def test_a_file_that_cannot_be_read_to_its_end_is_named():
    file = open("/proc/self/mem", "rb", buffering=0)  # noqa: SIM115 - nothing is at its address 0
    with file, pytest.raises(InputError, match=r"/proc/self/mem: cannot be read: Input/output error"):
        list(raw_lines(file))


class Drip(io.BytesIO):
    """A pipe that gives three bytes at a time."""

    def read(self, size=-1):
        return super().read(3)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with ExitStack() as stack, pytest.raises(InputError, match="nowhere: cannot be opened: No such file"):
        opened(tmp_path / "nowhere", stack)


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "out"
    with Output(path) as output:
        output.write(["a", "ä\u2028"])
        output.write([])
        assert output.lines == 2
    assert path.read_bytes() == "a\nä\u2028\n".encode()
    with pytest.raises(InputError, match=r"out: exists already: .* --resume"):
        Output(path, resume=False)
    with pytest.raises(InputError, match="cannot be written: No such file"):
        Output(tmp_path / "nowhere" / "out")


def test_one_process_at_a_time_writes_a_file(tmp_path):
    path = tmp_path / "out"
    with Output(path, resume=True) as output:
        output.write(["a"])
        with pytest.raises(InputError, match="out: another process is writing it"):
            Output(path, resume=True)
        output.write(["b"])
    with Output(path, resume=True) as output:
        assert output.lines == 2


@pytest.mark.parametrize(("there", "lines"), [(b"", 0), (b"a\nb\n", 2), (b"a\nb\nhalf a li", 2), (b"half", 0)])
def test_resuming_goes_on_behind_the_last_whole_line(tmp_path, there, lines):
    path = tmp_path / "out"
    path.write_bytes(there)
    with Output(path, resume=True) as output:
        assert output.lines == lines
        output.write(["c"])
        assert output.lines == lines + 1
    assert path.read_bytes() == there[: there.rfind(b"\n") + 1] + b"c\n"


@pytest.mark.parametrize("there", [b"a\nb\nprecious tail", b"one line without its end"])
def test_a_file_that_turns_out_to_be_the_wrong_one_is_left_as_it_is(tmp_path, there):
    path = tmp_path / "out"
    path.write_bytes(there)
    with pytest.raises(InputError, match="wrong"), Output(path, resume=True) as output:
        assert output.begins_with == there
        raise InputError("the wrong file")
    assert path.read_bytes() == there


def test_a_file_with_nothing_left_to_do_has_whole_lines(tmp_path):
    (tmp_path / "out").write_bytes(b"a\nhalf")
    with Output(tmp_path / "out", resume=True):
        pass
    assert (tmp_path / "out").read_bytes() == b"a\n"


def test_gzip_is_known_by_its_bytes_and_named_where_it_is_damaged(tmp_path):
    packed = gzip.compress(b"a\nb\n" * 1000)
    damaged = packed[:20] + b"\xff\xff" + packed[22:]
    for name, content in {"packed": packed, "short": packed[:-9], "damaged": damaged, "plain.gz": b"a\nb\n"}.items():
        (tmp_path / name).write_bytes(content)
    with ExitStack() as stack:
        assert list(raw_lines(opened(tmp_path / "packed", stack))) == [b"a", b"b"] * 1000
        assert list(raw_lines(opened(tmp_path / "plain.gz", stack))) == [b"a", b"b"]
        for name in ("short", "damaged"):
            with pytest.raises(InputError, match=f"{name}: cannot be read: "):
                list(raw_lines(opened(tmp_path / name, stack)))


def test_gzip_out_of_a_pipe_is_refused_since_nobody_can_look_before():
    packed = gzip.compress(b"a\nb\n")
    with pytest.raises(InputError, match="standard input: begins as a gzip file does: unpack it first, with zcat"):
        list(raw_lines(io.BytesIO(packed)))
    assert next(raw_lines(io.BytesIO(b"a\n" + packed))) == b"a"


@pytest.mark.parametrize("is_named", [False, True])
def test_a_full_pipe_that_does_not_wait_is_waited_for(monkeypatch, is_named):
    """Standard output is a buffer above such a pipe; one that is named is written to itself."""
    source, sink = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(sink, "w"))
    received = []

    def read_slowly():
        while block := os.read(source, 30_000):
            received.append(block)
            time.sleep(0.01)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    with Output(Path(f"/proc/self/fd/{sink}") if is_named else None) as output:
        os.set_blocking(output._file.fileno(), False)
        for _ in range(4):
            output.write(["x" * 99] * 1000)
    sys.stdout.close()
    reader.join()
    os.close(source)
    assert b"".join(received) == (b"x" * 99 + b"\n") * 4000


def test_resuming_what_was_never_begun_begins(tmp_path):
    with Output(tmp_path / "out", resume=True) as output:
        output.write(["a"])
    assert (tmp_path / "out").read_bytes() == b"a\n"


class Stubborn(io.FileIO):
    """A file that takes seven bytes at a time, and after `room` bytes none: a disk that is full, or Ctrl-C."""

    def __init__(self, path, room: int, error: BaseException):
        super().__init__(path, "r+")
        self.room, self.error = room, error

    def write(self, content):
        part = bytes(content[: min(7, self.room)])
        if not part:
            raise self.error
        self.room -= len(part)
        return super().write(part)


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_half_a_line_is_taken_back(tmp_path, error):
    path = tmp_path / "out"
    with Output(path) as output:
        output.write(["whole"])
        output._file.close()
        output._file = Stubborn(path, 20, error)
        output._file.seek(6)
        with pytest.raises((InputError, KeyboardInterrupt)) as caught:
            output.write(["x" * 10, "y" * 30])
    assert path.read_bytes() == b"whole\n"
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and "its first 1 lines are whole" in str(caught.value)


def test_a_json_line_is_one_line_and_json():
    value = {
        "text": "a\u2028b\u0085c\nd",
        "score": float("-inf"),
        "tokens": ("ä", "\u2029"),
        "all": [float("nan"), 1.5],
    }
    line = json_line(value)
    assert len(line.splitlines()) == 1 and "ä" in line
    expected = {"text": "a\u2028b\u0085c\nd", "score": None, "tokens": ["ä", "\u2029"], "all": [None, 1.5]}
    assert json.loads(line) == expected


def test_a_file_that_nothing_was_written_to_is_not_left_in_the_way(tmp_path):
    with pytest.raises(KeyError), Output(tmp_path / "out"):
        raise KeyError
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyError), Output(tmp_path / "out") as output:
        output.write(["a"])
        raise KeyError
    assert (tmp_path / "out").read_bytes() == b"a\n"


def test_what_is_no_file_is_written_to_and_left_where_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    check_writable(pipe)
    with Output(pipe, resume=True) as output:
        output.write(["a"])
    reader.join()
    assert read == [b"a\n"] and pipe.exists()
    with pytest.raises(KeyError), Output(Path(os.devnull)):
        raise KeyError
    assert os.path.exists(os.devnull)


def test_a_dash_is_standard_output(capfdbinary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(STANDARD_STREAM)
    with Output(STANDARD_STREAM) as output:
        output.write(["ä"])
    write_text(STANDARD_STREAM, "b\n")
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == "ä\nb\n".encode()
    assert not list(tmp_path.iterdir())


def test_text_is_written_or_the_place_named(tmp_path):
    write_text(tmp_path / "a", "ä\n")
    assert (tmp_path / "a").read_bytes() == "ä\n".encode()
    with pytest.raises(InputError, match=r"none/a: cannot be written: No such file"):
        write_text(tmp_path / "none" / "a", "")


def test_text_that_cannot_be_written_whole_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "earlier")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"/a: cannot be written: No space left"):
        write_text(tmp_path / "a", "half of it")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "earlier")]


def test_a_place_to_write_is_tried_and_left_as_it_is(tmp_path):
    with pytest.raises(InputError, match=r"none/a.json: cannot be written: No such file"):
        check_writable(tmp_path / "none" / "a.json")
    with pytest.raises(InputError, match=r"cannot be written: File name too long"):
        check_writable(tmp_path / ("a" * 300))
    check_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "old.json").write_text("kept")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "kept"
    (tmp_path / "link.json").symlink_to("other.json")
    check_writable(tmp_path / "link.json")
    write_text(tmp_path / "link.json", "through it")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "other.json").read_text() == "through it"


def test_output_to_a_directory_does_not_advise_to_remove_it(tmp_path):
    with pytest.raises(InputError, match="is a directory: name a file in it"):
        Output(tmp_path, resume=False)


def test_a_report_and_its_picture_are_two_files_that_can_be_written(tmp_path, monkeypatch):
    report, picture = tmp_path / "a.json", tmp_path / "a.png"
    check_outputs(None, None)
    check_outputs(STANDARD_STREAM, picture)
    check_outputs(report, None)
    check_outputs(report, picture)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--picture=-: a picture is not written to standard output"):
        check_outputs(report, STANDARD_STREAM)
    with pytest.raises(InputError, match=r"--json=.*a\.png: the map would overwrite it: name another"):
        check_outputs(picture, picture, "the map")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--json=a\.png: the map would overwrite it: name another"):
        check_outputs(Path("a.png"), picture, "the map")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match="standard output is closed: name a file to write"):
        check_outputs(STANDARD_STREAM, None)
    with pytest.raises(InputError, match=r"none/a\.png: cannot be written"):
        check_outputs(report, tmp_path / "none" / "a.png")


def test_a_pipe_that_does_not_wait_is_waited_for():
    """As a parent process may hand one over: a read gives nothing yet, which is not the end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def write() -> None:
        for part in (b"one\ntw", b"o\n", b"three"):
            time.sleep(0.05)
            os.write(writing, part)
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    with open(reading, "rb", buffering=0) as file:
        assert list(raw_lines(file)) == [b"one", b"two", b"three"]
    writer.join()
