"""`explain` as a user types it."""

import json

import pytest

from tfm.__main__ import main


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
