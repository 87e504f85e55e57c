"""`python -m tfm`, whatever the command does: errors and signals become statuses and one line."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from tfm.__main__ import COMMANDS, main
from tfm.config import InputError

ROOT = Path(__file__).parent.parent
WAIT = 20  # seconds


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL
    )


def test_help_lists_every_command_with_its_summary(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S.{{10,}}$", text, re.MULTILINE), command


def test_an_unknown_command_is_answered_by_one_line(capsys):
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tfm: error: trian: no such command; did you mean train?\n")
    assert main([]) == 2
    assert "expected one of train" in capsys.readouterr().err


@pytest.mark.parametrize("script", [["train.py"], ["-m", "tfm", "train"]])
def test_a_misspelt_option_ends_with_status_2_and_one_line(script):
    done = run(*script, "--config=base", "--model.d_modl=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "tfm train: error: --model.d_modl: unknown option; did you mean --model.d_model?\n"


def test_a_reader_that_leaves_ends_the_command_quietly():
    shell = f"{sys.executable} -m tfm translate --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")  # 0 where help was written before the reader had gone


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a.txt:3: not\nUTF-8"), 2, "tfm train: error: a.txt:3: not UTF-8\n"),
        (KeyboardInterrupt(), 130, "tfm: interrupted\n"),
    ],
)
def test_an_error_becomes_a_status_and_one_line(error, status, line, monkeypatch, capsys):
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("tfm.__main__._dispatch", fail)
    assert main(["train"]) == status
    assert capsys.readouterr().err == line


def test_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"tfm \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("dropped_by", ["garbage collector", "weak reference", "library", "nobody"])
def test_ctrl_c_is_not_lost_where_it_is_dropped_or_unseen(dropped_by, monkeypatch, capsys):
    """JAX has a callback of the garbage collector, and Python drops what a callback raises.

    And a signal that another thread gets, or that comes a moment before a wait, does not end the wait.
    """

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def in_garbage_collector(phase, info):
        if phase == "stop":
            gc.callbacks.remove(in_garbage_collector)
            press()

    def command(arguments):
        if dropped_by == "garbage collector":
            gc.callbacks.append(in_garbage_collector)
            gc.collect()
        elif dropped_by == "weak reference":
            thing = type("Thing", (), {})()
            reference = weakref.ref(thing, press)
            del thing
            assert reference() is None
        elif dropped_by == "library":
            with contextlib.suppress(BaseException):
                press()
        else:
            other = threading.Thread(target=time.sleep, args=[1])
            other.start()
            threading.Timer(0.1, signal.pthread_kill, [other.ident, signal.SIGINT]).start()
        time.sleep(WAIT)
        pytest.fail("it was lost")

    monkeypatch.setattr("tfm.__main__._dispatch", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = time.monotonic()
    try:
        assert main(["translate"]) == 130
        assert time.monotonic() - begun < WAIT, "it was not seen before the wait was over"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "tfm: interrupted\n"


def test_a_run_that_takes_ctrl_c_for_a_request_is_asked_once(monkeypatch):
    asked = []

    def command(arguments):
        before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            signal.signal(signal.SIGINT, before)
        time.sleep(0.5)
        return 0

    monkeypatch.setattr("tfm.__main__._dispatch", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["train"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [signal.SIGINT]


@pytest.mark.parametrize(
    ("command", "then"),
    [
        (["train", "--config=base", "--workdir=RUN"], "tfm.hosts.together"),
        (["benchmark", "train", "--config=base"], "tfm.hosts.together"),
        (["demo", "--workdir=RUN"], "tfm.data.demo_corpus.explained"),
    ],
)
def test_deterministic_kernels_are_asked_for_before_any_device(command, then, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # to be put back
    monkeypatch.setattr(then, reached)
    for asked in (False, True):
        with pytest.raises(Reached):
            main([word.replace("RUN", str(tmp_path)) for word in command] + [f"--training.deterministic={asked}"])
        assert ("--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"].split()) == asked


def test_an_address_that_nothing_reads_is_one_line(capsys):
    assert main(["train", "--config=demo", "--workdir=foo://bar"]) == 2
    assert "foo://bar: no kind of address that can be read" in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    def refuse(_):
        raise PermissionError(13, "Permission denied", "runs/mine")

    monkeypatch.setattr("tfm.commands.plan.main", refuse)
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == "tfm: error: runs/mine: Permission denied\n"


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tfm", "train", "--config=base", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "no more room" in done.stderr and "Traceback" not in done.stderr


def test_a_path_that_is_no_utf_8_is_printed_as_it_is():
    code = "import tfm.__main__ as m; m._dispatch = lambda _: print('a\\udcffb') or 0; m.main(['prepare'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == (b"a\xffb\n", b"")
