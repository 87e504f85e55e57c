"""`prepare`, `translate`, `score`, `evaluate` and `explain` as a user types them, on a run of a few steps."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from tfm.__main__ import main
from tfm.training.loop import train

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert train(tiny_config({"training.steps": 4}), workdir) == 0
    return workdir


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


def test_evaluate_scores_files_and_the_test_split_alike(trained, reversal, capsys, tmp_path):
    files = (f"--source={reversal / 'test.en'}", f"--reference={reversal / 'test.de'}")
    assert main(["evaluate", f"--workdir={trained}", *files, f"--output={tmp_path / 'out'}"]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", f"--workdir={trained}", "--json=-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sentences"] == 100
    assert report["steps"] == [4]
    for name in ("bleu", "chrf"):
        assert f"{name:<26} {report['scores'][name]['value']:6.2f}" in table
        assert "version:" in report["scores"][name]["signature"]
    assert len((tmp_path / "out").read_text().split("\n")) == 101


def test_evaluate_refuses_half_a_test_set(trained, reversal, capsys):
    assert main(["evaluate", f"--workdir={trained}", f"--source={reversal / 'test.en'}"]) == 2
    assert "--reference is missing" in capsys.readouterr().err
    files = (f"--source={reversal / 'test.en'}", f"--reference={reversal / 'train.de'}")
    assert main(["evaluate", f"--workdir={trained}", *files]) == 2
    assert "100 lines" in capsys.readouterr().err


def test_prepare_says_what_it_found(reversal, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(reversal, corpus)
    with (corpus / "train.en").open("ab") as source, (corpus / "train.de").open("ab") as target:
        source.write(b"\nred\xff\n")
        target.write(b"rot\nred\n")
    pattern = f"text:{corpus}/{{split}}.{{lang}}"
    argv = ["prepare", "--config=demo", f"--workdir={tmp_path / 'run'}", f"--data.corpus={pattern}"]
    assert main([*argv, "--data.vocab_size=300"]) == 0
    out = capsys.readouterr().out
    pairs = len((corpus / "train.en").read_bytes().split(b"\n")) - 1
    assert f"{pairs - 1}" in out  # the empty line
    assert f"{pairs}" in out  # bytes that are not UTF-8
    assert (tmp_path / "run" / "store" / "manifest.json").is_file()
    assert main([*argv, "--data.vocab_size=290"]) == 2
    assert "vocab_size" in capsys.readouterr().err
    (shard,) = (tmp_path / "run" / "store").glob("0-*.shard")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main([*argv, "--data.vocab_size=300"]) == 2
    assert f"{shard.name}: its content is not what the manifest says" in capsys.readouterr().err


def test_prepare_leaves_nothing_of_a_corpus_it_refuses(reversal, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(reversal, corpus)
    (corpus / "train.de").write_text("rot\n")
    pattern = f"text:{corpus}/{{split}}.{{lang}}"
    argv = ["prepare", "--config=demo", f"--workdir={tmp_path / 'run'}", f"--data.corpus={pattern}"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "train.en has" in err and "train.de has 1:" in err
    assert not (tmp_path / "run" / "store").exists()


def test_prepare_takes_the_tokenizer_of_the_run_that_training_starts_from(trained, tmp_path, capsys):
    """So that training, with the same options, finds the store that it needs."""
    argv = [f"--workdir={tmp_path / 'run'}", f"--training.initialize_from={trained}", "--training.steps=2"]
    config = tmp_path / "config.py"
    config.write_text(
        "from pathlib import Path\nfrom tfm.config import from_json\n"
        f"def get_config():\n    return from_json(Path({str(trained / 'config.json')!r}))\n"
    )
    assert main(["prepare", f"--config={config}", *argv]) == 0
    assert main(["train", f"--config={config}", *argv]) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["translate", "--decoding.sampling=True", "--decoding.beam_size=7"], "beam_size=7: has no effect with --dec"),
        (["translate", "--decoding.ensemble_mean=probs"], "ensemble_mean=probs: has no effect without --ensemble"),
        (["translate", "--mesh.tensor=-1"], "--mesh.tensor=-1: expected the number of devices"),
        (["translate", "--decoding.max_extra_tokens=2147483648"], "max_extra_tokens=2147483648: must be below"),
        (["train", "--training.initialize_from=a", "--data.tokenizer_model=bpe"], "bpe: has no effect with --training"),
        (["evaluate", "--source=a", "--reference=b", "--data.corpus=demo"], "--data.corpus=demo: has no effect with"),
        (["evaluate", "--source=a", "--reference=b", "--json=./b"], "--json=b: would overwrite --reference"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(trained, capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_text("red\n")
    assert main([*argv, f"--workdir={trained}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert (tmp_path / "b").read_text() == "red\n"


def test_translations_on_standard_output_are_all_that_is_there(trained, capfdbinary, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("red blue\n")
    argv = ["evaluate", f"--workdir={trained}", f"--source={tmp_path / 'a'}", f"--reference={tmp_path / 'b'}"]
    assert main([*argv, "--output=-"]) == 0
    out, err = capfdbinary.readouterr()
    assert out.count(b"\n") == 1 and b"bleu " not in out and b"bleu " in err


def test_evaluate_leaves_earlier_results_where_it_cannot_run(trained, capsys, tmp_path):
    for name in ("scores.json", "out"):
        (tmp_path / name).write_text("earlier")
    argv = ["evaluate", f"--workdir={trained}", f"--json={tmp_path / 'scores.json'}"]
    assert main([*argv, "--checkpoint=999"]) == 2
    assert "has no finished step 999" in capsys.readouterr().err
    assert main([*argv, f"--output={tmp_path / 'out'}"]) == 2
    assert "out: exists already" in capsys.readouterr().err
    assert main([*argv, f"--output={tmp_path / 'scores.json'}"]) == 2
    assert "scores.json: would overwrite --output" in capsys.readouterr().err
    assert {(tmp_path / name).read_text() for name in ("scores.json", "out")} == {"earlier"}


def test_explain_shows_where_the_model_looks(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["explain", f"--workdir={trained}", "--source=red blue green", "--json=weights.json"]
    assert main(argv) == 0
    translation, head, *rows = capsys.readouterr().out.split("\n")[:-1]
    found = json.loads((tmp_path / "weights.json").read_bytes())
    assert translation == found["translation"]
    assert head.split() == ["token", "log", "prob", "looks", "at"]
    assert [row.split()[1] for row in rows] == found["target_tokens"] and found["target_tokens"][-1] == "</s>"
    assert {kind: len(layers) for kind, layers in found["attention"].items()} == dict(cross=1, encoder=1, decoder=1)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv[:-1], "--json=-", "--target=green", "--attention=encoder", "--layer=1"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["translation"] == "green" and given["source_tokens"] == found["source_tokens"]
    assert given["attention"]["encoder"] == found["attention"]["encoder"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--source= "], "the source is blank"),
        (["--source=red", "--layer=2"], "--layer=2: the stack has layers 1 to 1"),
        (["--source=" + "red " * 400], "more than decoding.max_source_length="),
        (["--source=red", "--picture=no/where.png"], "no/where.png: cannot be written"),
        (["--source=red", "--picture=-"], "a picture is not written to standard output"),
        (["--source=red", "--json=a.png", "--picture=a.png"], "the picture would overwrite it"),
        (["--source=red", "--hosts.count=2"], "has no effect on tfm explain"),
        (
            ["--source=red", "--training.seed=3"],
            "--training.seed=3: has no effect on tfm explain, which trains nothing",
        ),
        (["--source=red", "--decoding.n_best=4"], "--decoding.n_best=4: has no effect on tfm explain"),
        (["--source=red", "--model.activation=gelu"], "model.activation=gelu: the run "),
    ],
)
def test_explain_refuses_what_it_cannot_show(trained, monkeypatch, capsys, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", f"--workdir={trained}", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


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


def test_translations_that_a_full_disk_does_not_take_are_one_line(trained):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tfm", "translate", f"--workdir={trained}"]
        done = subprocess.run(command, input="red\n", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2, done.stderr
    assert "standard output: cannot be written: No space left" in done.stderr
    assert "Exception" not in done.stderr and "Traceback" not in done.stderr


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
