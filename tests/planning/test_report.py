"""Plans as tables and pictures."""

import jax
import pytest

from tfm import sharding
from tfm.config import InputError, MeshConfig
from tfm.planning.compiled import state_bytes
from tfm.planning.report import draw_sweep, parameter_table, sweep_table, table
from tfm.training.step import trainer_of


def a_plan(chips: int, fits: bool = True) -> dict:
    predicted = {
        "bound_by": "memory",
        "predicted_step_seconds": 0.04,
        "predicted_target_tokens_per_second": chips * 1000.0,
        "predicted_target_tokens_per_second_as_sum": chips * 500.0,
        "predicted_model_flops_utilisation": 0.625,
    }
    return {
        "topology": f"v5e:{chips}x1",
        "slices": 1,
        "chip": "TPU v5e",
        "parameters": 63_045_632,
        "mesh": {"data": chips, "fsdp": 1, "tensor": 1},
        "chips": chips,
        "memory_per_chip": {"total_bytes": 3.5 * 2**30, "available_bytes": 16.0 * 2**30},
        "fits": fits,
        "flops_per_step": 9.99e12,
        "collectives": {"all-reduce": {"count": 27, "bytes": 5e8}},
        **(predicted if fits else {}),
    }


def test_every_figure_of_a_plan_is_in_its_table():
    text = table(a_plan(16))
    assert text.startswith("v5e:16x1, mesh data=16 x fsdp=1 x tensor=1\nTimes are a prediction")
    lines = {" ".join(line.split()) for line in text.split("\n")}
    assert {
        "parameters 63,045,632",
        "fits yes",
        "flops per step 9.99 TFLOP",
        "bytes 500 MB",
        "predicted step seconds 40.000 ms",
        "predicted target tokens per second 16,000",
        "predicted model flops utilisation 62.5%",
    } <= lines


def test_a_sweep_is_one_line_a_plan():
    lines = [line.split() for line in sweep_table([a_plan(16), a_plan(32, fits=False)]).split("\n")]
    assert lines[1] == ["v5e:16x1", "16,1,1", "16", "yes", "3.50", "memory", "16,000", "8,000", "1,000", "62.5%"]
    assert lines[2] == ["v5e:32x1", "32,1,1", "32", "no", "3.50", "-", "-", "-", "-", "-"]


def test_a_picture_of_a_sweep(tmp_path):
    path = tmp_path / "sweep.png"
    draw_sweep([a_plan(16), a_plan(64), a_plan(32, fits=False)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"nowhere/sweep\.png: cannot be written"):
        draw_sweep([a_plan(16)], tmp_path / "nowhere" / "sweep.png")


def test_every_parameter_with_its_axes_and_bytes(tiny_config):
    trainer = trainer_of(tiny_config(), 300, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    rows = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in parameter_table(trainer).split("\n")
    ]
    found = {row[0]: row[1:] for row in rows if row}
    assert found["target_embedding/table"] == ["384 x 16", "vocab, embed", "tensor, fsdp", f"{384 * 16:,}"]
    assert len(found) == len(jax.tree.leaves(trainer.abstract_state.parameters)) + 2
    assert found["total"] == [f"{int(state_bytes(trainer)['parameters']):,}"]
