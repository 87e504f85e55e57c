"""`translate` as a user types it, on a run of a few steps."""

import io
import shutil
import subprocess
import sys

import pytest

from tfm.__main__ import main

ODD_LINES = [
    b"red blue green",
    b"",
    b"   ",
    b"gold \xff\xfe black",  # no UTF-8
    b"red\x00blue",
    b"red\rblue",
    "red\u2028blue\u0085green".encode(),
    b"white " * 400,  # longer than any bucket
    b"black white",
]


def translate(monkeypatch, capsysbinary, source: bytes, *argv: str) -> tuple[int, bytes, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source)))
    status = main(["translate", *argv])
    out, err = capsysbinary.readouterr()
    return status, out, err.decode()


def test_one_line_out_for_each_line_in(trained, monkeypatch, capsysbinary, caplog):
    source = b"\n".join(ODD_LINES)  # the last line has no end
    status, out, _ = translate(monkeypatch, capsysbinary, source, f"--workdir={trained}")
    assert status == 0
    lines = out.split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == len(ODD_LINES)
    assert lines[1] == lines[2] == b""
    assert not any(b"\r" in line or b"\0" in line for line in lines)
    assert not set(out.decode()) & {"\u2028", "\u0085"}
    assert any("line 8 has" in record.getMessage() for record in caplog.records)


def test_no_line_in_is_no_line_out(trained, monkeypatch, capsysbinary):
    assert translate(monkeypatch, capsysbinary, b"", f"--workdir={trained}")[:2] == (0, b"")


def test_files_give_what_the_pipe_gives(trained, monkeypatch, capsysbinary, tmp_path):
    source = b"red blue\ngreen gold black\n"
    _, piped, _ = translate(monkeypatch, capsysbinary, source, f"--workdir={trained}")
    (tmp_path / "source").write_bytes(source)
    files = (f"--input={tmp_path / 'source'}", f"--output={tmp_path / 'target'}")
    assert main(["translate", f"--workdir={trained}", *files]) == 0
    assert (tmp_path / "target").read_bytes() == piped
    capsysbinary.readouterr()
    assert main(["translate", f"--workdir={trained}", *files]) == 2
    assert b"exists already" in capsysbinary.readouterr().err
    assert (tmp_path / "target").read_bytes() == piped


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workdir=nowhere"], ["nowhere", "config.json"]),
        (["--workdir={trained}", "--input=nowhere/source"], ["nowhere/source", "cannot be opened"]),
        (["--workdir={trained}", "--output=nowhere/target"], ["nowhere/target", "cannot be written"]),
        (["--workdir={trained}", "--resume"], ["--resume", "--output"]),
        (["--workdir={trained}", "--resume", "--output=-"], ["--resume", "--output"]),
        (["--workdir={trained}", "--data.target_language=fr"], ["target_language=fr", "no effect on tfm translate"]),
        (["--workdir={trained}", "--mesh.data=7"], ["--mesh.data=7", "no effect on tfm translate"]),
        (["--workdir={trained}", "--decoding.n_best=2"], ["decoding.n_best=2", "decoding.beam_size=1"]),
        (["--workdir={trained}", "--decoding.beam_size=400"], ["decoding.beam_size=400", "tokens"]),
        (["--workdir={trained}", "--decoding.sampling_top_k=5"], ["sampling_top_k=5", "decoding.sampling=True"]),
        (["--workdir={trained}", "--ensemble=nowhere"], ["nowhere", "config.json"]),
        (["--workdir={trained}", "--ensemble={trained}@7"], ["step 7", "there are: 4"]),
        (["--workdir={trained}", "--checkpoint=3"], ["step 3", "there are: 4"]),
        (["--workdir={trained}", "--checkpoint=newest"], ["newest", "last:N or best:N"]),
        (["--workdir={trained}", "--decoding.beam_size=0"], ["decoding.beam_size=0"]),
        (["--workdir={trained}", "--decoding.max_source_length=999999"], ["decoding.tokens_per_batch"]),
        (["--workdir={trained}", "--decoding.max_extra_tokens=2147483648"], ["2147483648", "must be below"]),
    ],
)
def test_wrong_arguments_end_with_one_line(trained, monkeypatch, capsysbinary, argv, words):
    argv = [word.format(trained=trained) for word in argv]
    status, out, err = translate(monkeypatch, capsysbinary, b"red\n", *argv)
    assert (status, out) == (2, b"")
    lines = [line for line in err.split("\n") if "error:" in line]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def test_an_interrupted_translation_is_continued(trained, monkeypatch, capsysbinary, tmp_path):
    source = b"".join(b"red blue %d\n" % number for number in range(7))
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert translate(monkeypatch, capsysbinary, source, f"--workdir={trained}", f"--output={whole}")[0] == 0
    lines = whole.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:2])
    argv = (f"--workdir={trained}", f"--output={part}", "--resume")
    assert translate(monkeypatch, capsysbinary, source, *argv)[0] == 0
    assert part.read_bytes() == whole.read_bytes()
    assert translate(monkeypatch, capsysbinary, source, *argv)[0] == 0  # and there is no more to do
    assert part.read_bytes() == whole.read_bytes()
    status, _, err = translate(monkeypatch, capsysbinary, b"red\n", *argv)
    assert status == 2 and "has 7 lines, more than there are to translate" in err
    status, _, err = translate(monkeypatch, capsysbinary, source, *argv, "--format=jsonl")
    assert status == 2 and "part: was written with --format=text" in err
    status, _, err = translate(monkeypatch, capsysbinary, b"", *argv, f"--input={part}")
    assert status == 2 and "part: is --input as well" in err
    status, _, err = translate(monkeypatch, capsysbinary, b"", *argv, f"--prefixes={part}")
    assert status == 2 and "part: is --prefixes as well" in err
    with part.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert main(["translate", *argv]) == 2
    assert b"part: is --input as well" in capsysbinary.readouterr().err
    assert part.read_bytes() == whole.read_bytes()


def test_an_interrupted_one_goes_on_with_the_prefixes_and_draws_of_its_lines(
    trained, monkeypatch, capsysbinary, tmp_path
):
    source, prefixes = tmp_path / "source", tmp_path / "prefixes"
    source.write_text("red blue\n" * 12)
    prefixes.write_text("red\nblue\ngreen\n\n" * 3)
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = (f"--workdir={trained}", f"--input={source}", f"--prefixes={prefixes}", "--decoding.sampling=True")
    assert translate(monkeypatch, capsysbinary, b"", *options, f"--output={whole}")[0] == 0
    lines = whole.read_text().split("\n")
    assert all(line.startswith(word) for line, word in zip(lines, ["red", "blue", "green"], strict=False))
    assert len(set(lines[:12])) == 12  # draws of their own
    part.write_text("\n".join(lines[:5]) + "\n")
    assert translate(monkeypatch, capsysbinary, b"", *options, f"--output={part}", "--resume")[0] == 0
    assert part.read_text() == whole.read_text()


def test_a_model_alone_and_twice_translate_alike(trained, monkeypatch, capsysbinary):
    source = b"red blue\ngreen gold black\n"
    once = translate(monkeypatch, capsysbinary, source, f"--workdir={trained}")
    twice = translate(monkeypatch, capsysbinary, source, f"--workdir={trained}", f"--ensemble={trained}@last")
    assert once[:2] == twice[:2]


def test_a_run_without_a_checkpoint_is_named(trained, monkeypatch, capsysbinary, tmp_path):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    status, _, err = translate(monkeypatch, capsysbinary, b"red\n", f"--workdir={tmp_path / 'run'}")
    assert status == 2
    assert "no finished checkpoint" in err


def test_translations_that_a_full_disk_does_not_take_are_one_line(trained):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tfm", "translate", f"--workdir={trained}"]
        done = subprocess.run(command, input="red\n", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2, done.stderr
    assert "standard output: cannot be written: No space left" in done.stderr
    assert "Exception" not in done.stderr and "Traceback" not in done.stderr
