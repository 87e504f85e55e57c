"""`tfm benchmark` as it is typed: results to stdout, the rest to stderr, mistakes in one line."""

import json

import pytest

from tfm.__main__ import main
from tfm.benchmarking import sweep
from tfm.benchmarking.peak import MatmulPeak

CONFIG = """
from tfm.config import *
def get_config():
    return Config(
        model=ModelConfig(d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1),
        data=DataConfig(vocab_size=100, source_row_length=32, target_row_length=32),
        training=TrainingConfig(target_tokens_per_batch=128),
        decoding=DecodingConfig(beam_size=2, max_source_length=16, tokens_per_batch=32),
    )
"""


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    def quick(devices, dtype):
        return MatmulPeak(devices, dtype, sizes=(32,), seconds=0.001)

    for function in (sweep.benchmark_training, sweep.benchmark_decoding):
        monkeypatch.setitem(function.__kwdefaults__, "make_peak", quick)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def test_a_sweep_gives_a_table_json_and_a_picture_and_is_compared(config, tmp_path, capsys):
    where = tmp_path / "a.json"
    argv = ["benchmark", "train", config, "--devices=1", "--steps=2", "--warmup=1", "--sweep=batch=2,4"]
    assert main([*argv, f"--json={where}"]) == 0
    assert len(capsys.readouterr().out.strip().split("\n")) == 3
    report = json.loads(where.read_text())
    assert [point["batch"] for point in report["points"]] == [2, 4]
    assert report["command"].startswith("tfm benchmark train --config=")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    assert main(["benchmark", "compare", str(where), str(where), "--json=-"]) == 0
    compared = json.loads(capsys.readouterr().out)
    ratios = {figure["ratio"] for point in compared["points"] for figure in point["figures"].values()}
    assert ratios == {1.0}
    assert main(["benchmark", "compare", str(where), str(where), "--json", str(tmp_path / "ratios.json")]) == 0
    assert json.loads((tmp_path / "ratios.json").read_text()) == compared
    assert "target_tokens_per_second" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_points_are_written_as_they_are_measured(kind, config, tmp_path, monkeypatch):
    where = tmp_path / "a.json"
    measure = getattr(sweep, f"time_{'training' if kind == 'train' else 'decoding'}")

    def interrupted(*args, **kwargs):
        if where.exists():
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(sweep, measure.__name__, interrupted)
    few = ["--devices=1", "--steps=1", "--warmup=0", "--sweep=batch=2,4", f"--json={where}"]
    assert main(["benchmark", kind, config, *few]) == 130
    assert [point["batch"] for point in json.loads(where.read_text())["points"]] == [2]


def test_json_on_standard_output_is_json_alone(config, tmp_path, capsys):
    argv = ["benchmark", "decode", config, "--devices=1", "--steps=1", "--warmup=1", "--length=5", "--beams", "1"]
    assert main([*argv, "--json=-", f"--profile={tmp_path / 'trace'}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [point["sentences"] for point in report["points"]] == [1, 5]
    assert all(point["profile"] for point in report["points"])
    assert len(list((tmp_path / "trace").iterdir())) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "tfm benchmark: says nothing to benchmark; expected one of train, decode, compare, before all options"),
        (["trian"], "trian: says nothing to benchmark; did you mean train?"),
        (["train"], "--config is missing"),
        (["train", "CONFIG", "--stepz=2"], "--stepz: unknown option; did you mean --steps?"),
        (["train", "CONFIG", "--steps=0"], "--steps=0: must be at least 1"),
        (["train", "CONFIG", "--sweep=bach=2"], "--sweep=bach=2: no axis 'bach'; did you mean batch?"),
        (["train", "CONFIG", "--picture=a.png"], "--picture: only a sweep is drawn; add --sweep"),
        (["train", "CONFIG", "--json=none/a.json"], "none/a.json: cannot be written: No such file or directory"),
        (["train", "CONFIG", "--sweep=devices=1,2", "--devices=2"], "--devices and --sweep=devices=1,2 say both"),
        (["decode", "CONFIG", "--sweep=batch=1,2", "--batches=3"], "--batches and --sweep=batch=1,2 say both"),
        (["decode", "CONFIG", "--sweep=length=8", "--batches", "1", "8"], "--batches: a sweep along length has one"),
        (["train", "CONFIG", "--sweep=batch=2", "--picture=-"], "--picture=-: a picture is not written to standard"),
        (["train", "CONFIG", "--json=~nobody-here/a"], "~nobody-here/a: there is no home directory of that name"),
        (["train", "CONFIG", "--json=.", "--sweep=batch=2"], ".: cannot be written: Is a directory"),
        (
            ["train", "CONFIG", "--json=a.png", "--sweep=batch=2"],
            "a.png: the picture of the sweep would",
        ),
        (["train", "CONFIG", "--devices=0"], "0 devices are asked for: at least one is needed"),
        (["decode", "CONFIG", "--devices=-1"], "-1 devices are asked for: at least one is needed"),
        (["decode", "CONFIG", "--length=0"], "must be at least 1"),
        (["decode", "CONFIG", "--beams", "1", "99999"], "decoding.beam_size=99999 is more than the"),
        (
            ["decode", "CONFIG", "--decoding.sampling"],
            "--decoding.sampling=True: has no effect on",
        ),
        (["decode", "CONFIG", "--mesh.fsdp=2"], "--mesh.fsdp=2: has no effect on tfm benchmark decode"),
        (["decode", "CONFIG", "--devices=3", "--mesh.tensor=3"], "which mesh.tensor=3 does not divide"),
        (["train", "CONFIG", "--profile=/dev/null/x"], "--profile=/dev/null/x: cannot be written: Not a directory"),
        (["compare", "a.json"], "1 reports are given, and two are compared; usage: tfm benchmark compare"),
        (["compare", "a", "b", "--jsn=c"], "--jsn=c: unknown option; usage: tfm benchmark compare"),
        (["compare", "a", "b", "--json"], "--json: unknown option; usage: tfm benchmark compare"),
        (["compare", "a.json", "b.json", "--json=b.json"], "--json=b.json: would overwrite a report that is compared"),
        (["compare", "a.json", "b.json"], "a.json: cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_answered_by_one_line(argv, message, config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *(config if part == "CONFIG" else part for part in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.startswith("tfm benchmark: error: ") and err.count("\n") == 1
