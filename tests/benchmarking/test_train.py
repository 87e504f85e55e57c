"""What is timed is the Trainer's own step on packed batches, and the figures belong together."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm import device_memory, sharding
from tfm.benchmarking import programs, train
from tfm.benchmarking.train import TrainTiming, time_training, unrolled_flops, workload
from tfm.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from tfm.device_memory import OutOfDeviceMemory
from tfm.model.flops import train_step_flops
from tfm.training.step import trainer_of

STEPS, WARMUP = 5, 1


@pytest.fixture(scope="module")
def devices():
    return jax.devices()[:1]


@pytest.fixture(scope="module")
def peak(devices, make_peak):
    return make_peak(devices, jnp.dtype("float32"))


@pytest.fixture(scope="module")
def timed(tiny, devices, peak):
    return time_training(tiny, devices, TrainTiming(steps=STEPS, warmup=WARMUP), peak)


def steps_of_the_trainer(config, devices, numbers, lengths="natural") -> tuple[float, list]:
    """The loss after these batches, by the trainer's own function, and the batches."""
    mesh = sharding.make_mesh(config.mesh, devices)
    with workload(config, lengths) as (vocab_size, batches), jax.set_mesh(mesh):
        trainer = trainer_of(config, vocab_size, mesh)
        state = trainer.init()
        for k in numbers:
            state, metrics = trainer.train_step(state, batches.global_batch(k, sharding.batch_sharding(mesh)))
        return float(metrics["loss"]), [batches.host_batch(k) for k in numbers]


def test_the_steps_are_the_trainer_s(timed, tiny, devices):
    loss, _ = steps_of_the_trainer(tiny, devices, [0, 1, 2, 3, 0, 1])
    assert timed["loss"] == loss


def test_the_pipeline_s_batches_come_in_order_and_once(tiny, devices, peak):
    timed = time_training(tiny, devices, TrainTiming(pipeline=True, steps=STEPS, warmup=WARMUP), peak)
    loss, batches = steps_of_the_trainer(tiny, devices, range(6))
    assert timed["loss"] == loss
    assert timed["pipeline"] is True
    tokens = np.mean([np.count_nonzero(batch.target_segments) for batch in batches[WARMUP:]])
    assert timed["target_tokens_per_second"] * timed["step_seconds_median"] == pytest.approx(tokens)


def test_rates_are_contents_over_the_median_step(timed, tiny, devices):
    _, batches = steps_of_the_trainer(tiny, devices, [1, 2, 3, 0, 1])
    seconds = timed["step_seconds_median"]
    source = np.mean([np.count_nonzero(batch.source_segments) for batch in batches])
    target = np.mean([np.count_nonzero(batch.target_segments) for batch in batches])
    pairs = np.mean([np.sum(batch.target_positions[batch.target_segments > 0] == 0) for batch in batches])
    for name, amount in {
        "source_tokens": source,
        "target_tokens": target,
        "non_padding_tokens": source + target,
        "sentences": pairs,
        "model_flops": timed["model_flops"],
    }.items():
        assert timed[f"{name}_per_second"] * seconds == pytest.approx(amount)
        assert timed[f"{name}_per_second_per_device"] == timed[f"{name}_per_second"]
    assert timed["source_padding"] == pytest.approx(1 - source / (8 * 32))
    assert timed["target_padding"] == pytest.approx(1 - target / (8 * 48))
    assert batches[0].target_segments.max() > 1, "pairs share rows"


def test_percentiles_and_stages_are_in_order(timed):
    assert 0 < timed["step_seconds_p10"] <= timed["step_seconds_median"] <= timed["step_seconds_p90"]
    stages = [timed[f"compile_{stage}_seconds"] for stage in ("trace", "lower", "backend")]
    assert all(stage > 0 for stage in stages)
    assert timed["compile_seconds"] == pytest.approx(sum(stages))


def test_flops_are_the_formula_s_and_mfu_is_their_share_of_the_peak(timed, tiny):
    assert timed["model_flops"] == train_step_flops(tiny.model, 100, 8, 32, 48)
    expected = timed["model_flops"] / timed["step_seconds_median"] / timed["matmul_peak_flops"]
    assert timed["mfu"] == pytest.approx(expected)
    assert timed["mfu_of_published_peak"] is None  # nobody publishes one of a CPU


def test_memory_is_the_program_s_where_the_device_does_not_count(timed):
    assert timed["peak_device_memory_source"] == "program"
    assert timed["peak_device_memory_bytes"] == timed["program_memory_bytes"] > 4 * timed["parameters"]


def test_the_result_is_json(timed):
    assert json.loads(json.dumps(timed)) == timed


def test_xla_counts_the_same_however_the_step_is_laid_out(tiny, devices, timed):
    """Every loop is unrolled for it: neither layers nor micro-batches nor devices change what is to be computed."""
    assert 1.0 < timed["hardware_flops"] / timed["model_flops"] < 2.0  # elementwise work weighs in so small a model
    mesh = sharding.make_mesh(tiny.mesh, devices)
    split = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, gradient_accumulation=2))
    assert unrolled_flops(split, 100, mesh) == timed["hardware_flops"]
    on_two = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    assert unrolled_flops(tiny, 100, on_two) == pytest.approx(timed["hardware_flops"], rel=1e-3)
    again = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, remat="full"))
    assert unrolled_flops(again, 100, mesh) > 1.2 * timed["hardware_flops"]


def test_the_formula_counts_what_xla_counts():
    """Of a model that is wide enough for its products to be nearly all."""
    model = ModelConfig(d_model=256, d_ff=1024, num_heads=4, encoder_layers=1, decoder_layers=1)
    data = DataConfig(vocab_size=512, source_row_length=64, target_row_length=64)
    config = Config(model=model, data=data, training=TrainingConfig(target_tokens_per_batch=8 * 64))
    counted = unrolled_flops(config, 512, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    assert counted == pytest.approx(train_step_flops(model, 512, 8, 64, 64), rel=0.03)


def test_figures_follow_from_the_clock(tiny, devices, peak, monkeypatch):
    """A clock that goes faster and faster: stages of 1, 3 and 5 s, a step of 9 s before the five that count."""
    clock = SimpleNamespace(perf_counter=map(lambda n: float(n * n), itertools.count()).__next__)
    monkeypatch.setattr(programs, "time", clock)
    monkeypatch.setattr(train, "time", clock)
    timed = time_training(tiny, devices, TrainTiming(steps=5, warmup=1), peak)
    stages = [timed[f"compile_{stage}seconds"] for stage in ("", "trace_", "lower_", "backend_")]
    assert stages == [9, 1, 3, 5]
    steps = [13, 17, 21, 25, 29]
    assert timed["step_seconds_median"] == 21
    assert timed["step_seconds_p10"] == pytest.approx(np.percentile(steps, 10))
    assert timed["target_tokens_per_second"] * 21 == pytest.approx((1 - timed["target_padding"]) * 8 * 48)
    assert timed["mfu"] == pytest.approx(timed["model_flops"] / 21 / timed["matmul_peak_flops"])


def test_a_mesh_has_collectives_and_rates_for_each_device(tiny, make_peak):
    devices = jax.devices()[:2]
    peak = make_peak(devices, jnp.dtype("float32"))
    timed = time_training(tiny, devices, TrainTiming(lengths="full", steps=2, warmup=0), peak)
    assert timed["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert timed["collectives"]["all-reduce"] > 0
    assert timed["target_tokens_per_second_per_device"] == pytest.approx(timed["target_tokens_per_second"] / 2)
    assert (timed["source_padding"], timed["target_padding"]) == (0, 0)
    assert timed["sentences_per_second"] * timed["step_seconds_median"] == pytest.approx(8)


def test_a_real_corpus_brings_its_lengths_and_its_vocabulary(tiny_config, devices, peak):
    timed = time_training(tiny_config(), devices, TrainTiming(lengths="corpus", steps=1, warmup=0), peak)
    assert 262 < timed["vocab_size"] <= 300
    assert 0 < timed["target_padding"] < 0.2


def test_a_trace_becomes_a_table_of_the_parts_of_the_model(tiny, devices, peak, tmp_path):
    timed = time_training(tiny, devices, TrainTiming(steps=1, warmup=0, profile=tmp_path), peak)
    assert list(tmp_path.rglob("*.xplane.pb"))
    parts = {row["part"] for row in timed["profile"]}
    assert {"decoder/cross_attention", "decoder/cross_attention, backward", "update"} <= parts
    assert sum(row["share"] for row in timed["profile"]) == pytest.approx(1)


def test_rows_that_do_not_divide_are_refused(tiny, make_peak):
    devices = jax.devices()[:3]
    with pytest.raises(ConfigError, match=r"do not divide over mesh\.data"):
        time_training(tiny, devices, TrainTiming(), make_peak(devices, jnp.dtype("float32")))


def test_a_batch_that_does_not_fit_is_told_with_the_largest_power_of_two_that_does(tiny, make_peak, monkeypatch):
    """Memory that 8 rows do not fit in and 4 do; XLA says what each takes."""
    mesh = sharding.make_mesh(tiny.mesh, jax.devices()[:1])

    def needed(rows: int) -> int:
        config = tiny.with_rows(rows)
        trainer = trainer_of(config, tiny.data.vocab_size, mesh)
        with jax.set_mesh(mesh):
            compiled = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile()
        return programs.memory(compiled, [])["program_memory_bytes"]

    monkeypatch.setattr(device_memory, "room_of", lambda device: needed(4))
    message = r"a step of 8 rows \(training.*=384\): needs .* GiB .*; 4 rows fit, .*: --training.*=192$"
    peak = make_peak(jax.devices()[:1], jnp.float32)
    with pytest.raises(OutOfDeviceMemory, match=message):
        time_training(tiny, jax.devices()[:1], TrainTiming(steps=1, warmup=0), peak)
