"""`score` as a user types it, beside what `translate` says."""

import io
import json
import sys

import pytest

from tfm.__main__ import main


def test_json_lines_hold_all_translations_and_score_agrees(trained, monkeypatch, capsysbinary, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"red blue green\n\nblack\n")
    argv = [f"--workdir={trained}", "--decoding.beam_size=3", "--decoding.n_best=2", "--format=jsonl"]
    found = tmp_path / "found.jsonl"
    assert main(["translate", *argv, f"--input={source}", f"--output={found}"]) == 0
    translated = [json.loads(line) for line in found.read_bytes().split(b"\n")[:-1]]
    assert [one["line"] for one in translated] == [1, 2, 3]
    assert [len(one["translations"]) for one in translated] == [2, 1, 2]
    capsysbinary.readouterr()
    assert main(["score", f"--workdir={trained}", f"--source={source}", f"--target={found}"]) == 0
    scores = [float(line) for line in capsysbinary.readouterr().out.split(b"\n")[:-1]]
    for index in (0, 2):
        assert scores[index] == pytest.approx(translated[index]["translations"][0]["log_prob"], abs=1e-4)
    with found.open("rb") as file:  # a pipe has no name to tell it by
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert main(["score", f"--workdir={trained}", f"--source={source}", "--target=-"]) == 0
    assert [float(line) for line in capsysbinary.readouterr().out.split(b"\n")[:-1]] == scores
    assert main(["score", *argv[:1], f"--source={source}", f"--target={source}", "--format=jsonl"]) == 0
    scored = [json.loads(line) for line in capsysbinary.readouterr().out.split(b"\n")[:-1]]
    for one in scored:
        assert sum(one["token_log_probs"]) == pytest.approx(one["log_prob"], abs=1e-4)
        assert len(one["token_log_probs"]) == (len(one["tokens"]) + 1 if one["tokens"] else 0)


def test_score_names_what_it_cannot_score(trained, capsys, tmp_path):
    (tmp_path / "two").write_bytes(b"red\nblue\n")
    (tmp_path / "one.jsonl").write_bytes(b"{}\n")
    argv = ["score", f"--workdir={trained}", f"--target={tmp_path / 'one.jsonl'}"]
    assert main([*argv, f"--source={tmp_path / 'two'}"]) == 2
    assert "two has 2 lines and" in capsys.readouterr().err
    assert main([*argv, f"--source={tmp_path / 'one.jsonl'}"]) == 2
    assert "one.jsonl:1: not a line of `translate --format=jsonl`" in capsys.readouterr().err


def test_score_reads_on_from_where_standard_input_is(trained, monkeypatch, capsysbinary, tmp_path):
    (tmp_path / "source").write_text("a header\nred blue\ngreen\n")
    (tmp_path / "target").write_text("blue red\ngreen\n")
    command = ["score", f"--workdir={trained}", f"--target={tmp_path / 'target'}"]
    with (tmp_path / "source").open("rb", buffering=0) as file:
        assert file.readline() == b"a header\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(file)))
        assert main([*command, "--source=-"]) == 0
    found = capsysbinary.readouterr().out
    (tmp_path / "source").write_text("red blue\ngreen\n")
    assert main([*command, f"--source={tmp_path / 'source'}"]) == 0
    assert capsysbinary.readouterr().out == found


@pytest.mark.parametrize(
    "argv",
    [
        ["score", "--source=-", "--target=-"],
        ["translate", "--prefixes=-"],
        ["translate", "--input=-", "--prefixes=-"],
    ],
)
def test_two_inputs_cannot_both_be_standard_input(trained, argv, capsys):
    assert main([*argv, f"--workdir={trained}"]) == 2
    assert "only one of them can be standard input" in capsys.readouterr().err
