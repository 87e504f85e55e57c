"""The command, end to end without a topology, and what it refuses."""

import json

import pytest

from tfm.__main__ import main

TINY = ["--model.d_model=16", "--model.d_ff=32", "--model.num_heads=2", "--model.encoder_layers=1"]
TINY += ["--model.decoder_layers=1", "--data.vocab_size=300"]
BATCH = "--training.target_tokens_per_batch=4096"


def plan(*options: str) -> int:
    batch = [] if any(option.startswith("--rows_per_chip") for option in options) else [BATCH]
    return main(["plan", "--config=base", *TINY, *batch, *options])


def test_without_a_topology_end_to_end(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert plan(f"--json={path}") == 0
    text = capsys.readouterr().out
    values = json.loads(path.read_text())
    assert values["fits"] is True
    assert f"{values['parameters']:,}" in text
    assert plan("--json=-") == 0
    assert json.loads(capsys.readouterr().out) == values


def test_the_parameters_one_a_line(capsys):
    assert plan("--parameters", "--mesh.tensor=2") == 0
    text = capsys.readouterr().out
    assert "encoder/layers/feed_forward/inner/kernel" in text
    assert "layers, embed, mlp" in text
    assert "-, fsdp, tensor" in text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--topology=v5e:5x5"], ["--topology=v5e:5x5: no such TPU topology", "v4:2x2x1", "v6e:16x16"]),
        (["--topology=v5e:2x2", "--topology=v5e:5x5"], ["--topology=v5e:5x5"]),
        (["--mesh.data=3"], ["mesh.data=3", "needs 3 devices, and there are 8"]),
        (["--rows_per_chip=0"], ["--rows_per_chip=0", "at least 1"]),
        (["--rows_per_chip=2", BATCH], [f"{BATCH}: has no effect with --rows_per_chip"]),
        (["--workdir=runs/mine"], ["--workdir=runs/mine: has no effect with --config"]),
        (["--data.vocab_size=10000000000"], ["data.vocab_size=10000000000: must be below 2147483648"]),
        (["--picture=x.png"], ["--picture", "name them with --topology"]),
        (["--topology=v5e:2x2", "--meshes=a"], ["--meshes a", "data,fsdp,tensor"]),
        (["--topology=v5e:2x2", "--meshes=-1,1,1", "--mesh.fsdp=4"], ["--mesh.fsdp=4 and --meshes", "leave one"]),
        (["--parameters", "--json=p.json"], ["--parameters prints a table", "does not take --json"]),
        (["--topologie=v5e:2x2"], ["did you mean --topology?"]),
    ],
)
def test_a_mistake_is_answered_by_one_line_and_status_2(options, parts, capsys):
    assert plan(*options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tfm plan: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr("tfm.planning.topology.find_spec", lambda name: None)
    assert plan("--topology=v5e:4x4") == 2
    assert "pip install -r requirements-tpu.txt" in capsys.readouterr().err


def test_a_failure_late_in_a_sweep_keeps_what_was_planned(monkeypatch, tmp_path, capsys):
    first = {"device": "cpu", "mesh": {"data": 1}, "fits": True}

    def sweep(*_):
        yield first
        raise ValueError("the compiler stumbles")

    monkeypatch.setattr("tfm.planning.plan.sweep", sweep)
    path = tmp_path / "plans.json"
    with pytest.raises(ValueError, match="stumbles"):
        plan("--topology=v5e:2x2", "--topology=v5e:4x4", f"--json={path}")
    assert json.loads(path.read_text()) == [first]
    assert "cpu, mesh data=1" in capsys.readouterr().out


def test_what_does_not_fit_is_reported_in_full_and_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tfm.device_memory.room_of", lambda device: 1000)
    path = tmp_path / "plan.json"
    assert plan(f"--json={path}") == 2
    assert json.loads(path.read_text())["fits"] is False
    assert "does not fit" in capsys.readouterr().err
