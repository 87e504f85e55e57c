"""`translate` among other programs: pipes that are slow, that close, that hold anything at all, and that never end."""

import contextlib
import os
import random
import signal
import subprocess
import sys

import pytest


def start(workdir, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tfm", "translate", f"--workdir={workdir}", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")},
    )


def test_a_slow_pipe_is_answered_line_by_line_and_ctrl_c_ends_it(trained):
    process = start(trained)
    for line in (b"red blue\n", b"\n", b"gold\n"):
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer.endswith(b"\n") and (line != b"\n" or answer == b"\n")
    process.send_signal(signal.SIGINT)  # while its standard input is still open
    assert process.wait(60) == 130
    errors = process.stderr.read().decode()
    assert "tfm: interrupted" in errors and "Traceback" not in errors and "Fatal" not in errors
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_a_reader_that_has_had_enough_is_no_error(trained):
    process = start(trained)
    process.stdin.write(b"red blue\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"gold\n")
    process.stdin.flush()  # and more may follow
    process.wait(60)
    errors = process.stderr.read().decode()
    assert "Traceback" not in errors and "error" not in errors.lower()
    process.stderr.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def fuzzed_line(generator: random.Random) -> bytes:
    kind = generator.randrange(8)
    if kind == 0:
        return generator.choice([b"", b" ", b"\t \xc2\xa0", b"\r", b"\0"])
    if kind == 1:
        return generator.randbytes(generator.randrange(60)).replace(b"\n", b"")
    if kind == 2:
        characters = "\u2028\u2029\u0085\x0b\x0c\x1c\ufeff\u200b🙂汉字ßéa \r"
        return "".join(generator.choices(characters, k=generator.randrange(30))).encode()
    if kind == 3 and generator.random() < 0.01:
        return generator.choice([b"red ", b"x", "字".encode(), b"blue. "]) * generator.randrange(20_000)
    return " ".join(generator.choices(["red", "blue", "green", "<2de>", "gold"], k=generator.randrange(1, 12))).encode()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_thousand_lines_of_anything_are_ten_thousand_lines_in_order(trained, tmp_path):
    generator = random.Random(11)
    lines = [fuzzed_line(generator) for _ in range(10_000)]
    marks = range(0, 10_000, 97)
    for mark in marks:
        lines[mark] = b"red blue gold"
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    process = start(trained, f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    found = (tmp_path / "out").read_bytes()
    assert found.endswith(b"\n") and found.count(b"\n") == 10_000
    text = found.decode()  # all of it UTF-8
    assert not set(text) & set("\r\u2028\u2029\u0085\x0b\x0c\x1c")
    translated = text.split("\n")[:-1]
    assert len({translated[mark] for mark in marks}) == 1
    for line, translation in zip(lines, translated, strict=True):
        if not line.decode(errors="replace").strip():
            assert translation == ""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_memory_does_not_grow_with_the_input(trained, tmp_path):
    """Resident memory after 300,000 lines of a file is at most 5 % more than after 10,000."""
    generator = random.Random(3)
    lines = [b" ".join(generator.choices([b"red", b"blue", b"gold"], k=generator.randint(2, 6))) for _ in range(10_000)]
    (tmp_path / "in").write_bytes(b"".join(line + b"\n" for line in lines * 32))
    process = start(trained, f"--input={tmp_path / 'in'}")
    resident = {}
    for answered, _ in enumerate(process.stdout, 1):
        if answered in (10_000, 300_000):
            with open(f"/proc/{process.pid}/statm") as file:
                resident[answered] = int(file.read().split()[1])
    errors = process.communicate()[1].decode()
    assert process.returncode == 0 and answered == 320_000, errors
    assert 0 < resident[300_000] <= 1.05 * resident[10_000], f"{resident} pages"
