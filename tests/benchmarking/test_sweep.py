"""Sweeps: which config each point has, and reports that can be reproduced."""

import dataclasses
import json

import jax
import pytest

from tfm.benchmarking.decode import DecodeTiming
from tfm.benchmarking.sweep import Sweep, benchmark_decoding, benchmark_training, devices_for, train_config
from tfm.benchmarking.train import TrainTiming
from tfm.config import ConfigError, InputError, from_dict
from tfm.device_memory import OutOfDeviceMemory


def test_a_sweep_is_an_axis_and_its_values():
    assert Sweep.parse("batch=32,64,32") == Sweep("batch", (32, 64))
    assert Sweep.parse("devices=1, 2") == Sweep("devices", (1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach=1", "no axis 'bach'; did you mean batch?"),
        ("depth=1", "there are batch, length, devices"),
        ("batch", "expected whole numbers above 0, such as --sweep=batch=1,2,4"),
        ("batch=1,x", "expected whole numbers"),
        ("batch=0", "expected whole numbers"),
    ],
)
def test_what_is_no_sweep_is_refused(text, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        Sweep.parse(text)


def test_the_config_of_each_point(tiny):
    assert train_config(tiny, "batch", 3).rows_per_batch == 3
    assert train_config(tiny, "devices", 4).rows_per_batch == 4 * tiny.rows_per_batch
    longer = train_config(tiny, "length", 96)
    assert (longer.data.source_row_length, longer.data.target_row_length, longer.rows_per_batch) == (96, 96, 4)
    with pytest.raises(ConfigError, match="target_tokens_per_batch"):
        train_config(tiny, "length", 1000)


def test_a_training_report_says_how_to_make_it_again(tiny, make_peak):
    argv = ["train", "--config=a b.py"]
    report = benchmark_training(tiny, TrainTiming(steps=1, warmup=0), argv, jax.devices()[:1], make_peak=make_peak)
    assert report["benchmark"] == "train"
    assert report["command"] == "tfm benchmark train '--config=a b.py'"
    assert {"jax", "numpy", "python", "tfm"} <= set(report["versions"])
    assert report["device"]["platform"] == "cpu"
    (point,) = report["points"]
    assert {key: report[key] for key in point} == point
    assert {
        "target_tokens_per_second",
        "step_seconds_median",
        "compile_seconds",
        "mfu",
        "matmul_peak_flops",
    } <= set(report)
    assert from_dict(json.loads(json.dumps(report))["config"]) == tiny


def test_a_sweep_over_devices_keeps_the_rows_of_each(tiny, make_peak):
    sweep = Sweep("devices", (1, 2))
    timing = TrainTiming(steps=1, warmup=0)
    report = benchmark_training(tiny, timing, [], devices_for(None, sweep), sweep=sweep, make_peak=make_peak)
    assert report["sweep"] == {"axis": "devices", "values": [1, 2]}
    assert [(point["devices"], point["rows_per_batch"]) for point in report["points"]] == [(1, 8), (2, 16)]
    assert {one["devices"] for one in report["matmul_peaks"]} == {1, 2}


def test_decoding_has_the_latency_of_one_and_the_throughput_of_many(tiny, make_peak):
    timing = DecodeTiming(length=7, steps=1, warmup=1)
    report = benchmark_decoding(tiny, timing, [], jax.devices()[:1], make_peak=make_peak)
    points = [(point["beam_size"], point["sentences"]) for point in report["points"]]
    assert points == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert report["latency_seconds_median"] == report["points"][2]["search_seconds_median"]
    assert report["sentences_per_second"] == report["points"][3]["sentences_per_second"]


def test_the_latency_at_the_top_is_of_the_last_point_as_the_rest_is(tiny, make_peak, point, monkeypatch):
    def timed(config, devices, timing, peak, *, beams, sentences):
        return point(beam_size=beams, sentences=sentences, search_seconds_median=timing.length / 10)

    monkeypatch.setattr("tfm.benchmarking.sweep.time_decoding", timed)
    report = benchmark_decoding(
        tiny,
        DecodeTiming(length=7),
        [],
        jax.devices()[:1],
        batches=[1],
        sweep=Sweep("length", (4, 8)),
        make_peak=make_peak,
    )
    assert report["latency_seconds_median"] == 0.8


def test_a_sweep_is_refused_before_its_first_point_is_measured(tiny, make_peak, monkeypatch):
    monkeypatch.setattr("tfm.benchmarking.sweep.time_training", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="do not divide over"):
        benchmark_training(
            tiny, TrainTiming(), [], jax.devices()[:2], sweep=Sweep("batch", (2, 3)), make_peak=make_peak
        )


def test_rows_that_a_step_would_not_have_are_refused(tiny):
    halves = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, gradient_accumulation=2))
    assert train_config(halves, "batch", 4).rows_per_batch == 4
    with pytest.raises(ConfigError, match=r"5 rows are no multiple of .* 2: name such numbers"):
        train_config(halves, "batch", 5)


def test_devices_that_do_not_divide_the_parameters_are_refused_first(tiny, make_peak, monkeypatch):
    monkeypatch.setattr("tfm.benchmarking.sweep.time_training", lambda *_: pytest.fail("measured"))
    split = dataclasses.replace(tiny, mesh=dataclasses.replace(tiny.mesh, data=1, fsdp=-1))
    with pytest.raises(ConfigError, match="fsdp"):
        benchmark_training(
            split, TrainTiming(), [], jax.devices()[:3], sweep=Sweep("devices", (1, 3)), make_peak=make_peak
        )


def test_a_point_that_does_not_fit_costs_none_of_the_others(tiny, make_peak, point, monkeypatch, caplog):
    room = 4

    def timed(config, *_):
        if config.rows_per_batch > room:
            raise OutOfDeviceMemory(f"a step of {config.rows_per_batch} rows: needs too much")
        return point()

    monkeypatch.setattr("tfm.benchmarking.sweep.time_training", timed)
    sweep = Sweep("batch", (8, 2, 4))
    report = benchmark_training(tiny, TrainTiming(), [], jax.devices()[:1], sweep=sweep, make_peak=make_peak)
    assert [p["batch"] for p in report["points"]] == [2, 4]
    assert "a step of 8 rows: needs too much: left out" in caplog.text
    room = 1
    with pytest.raises(OutOfDeviceMemory, match="a step of 8 rows"):
        benchmark_training(tiny, TrainTiming(), [], jax.devices()[:1], sweep=sweep, make_peak=make_peak)


def test_a_point_that_fails_costs_none_before_it(tiny, make_peak, point, monkeypatch):
    def timed(config, *_):
        if config.rows_per_batch == 4:
            raise KeyboardInterrupt
        return point()

    monkeypatch.setattr("tfm.benchmarking.sweep.time_training", timed)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        benchmark_training(
            tiny,
            TrainTiming(),
            [],
            jax.devices()[:1],
            sweep=Sweep("batch", (1, 2, 4)),
            make_peak=make_peak,
            keep=kept.append,
        )
    assert [[p["batch"] for p in report["points"]] for report in kept] == [[1], [1, 2]]


def test_a_decoding_sweep_changes_one_thing(tiny, make_peak, monkeypatch):
    seen = []

    def timed(config, devices, timing, peak, *, beams, sentences):
        seen.append((len(devices), timing.length, beams, sentences))
        return {"beam_size": beams, "sentences": sentences, "search_seconds_median": 1.0, "sentences_per_second": 1.0}

    monkeypatch.setattr("tfm.benchmarking.sweep.time_decoding", timed)
    for sweep in (Sweep("batch", (2, 8)), Sweep("length", (3, 7)), Sweep("devices", (1, 2))):
        devices = devices_for(None if sweep.axis == "devices" else 1, sweep)
        benchmark_decoding(tiny, DecodeTiming(), [], devices, beams=(1,), sweep=sweep, make_peak=make_peak)
    assert seen == [(1, 32, 1, 2), (1, 32, 1, 8), (1, 3, 1, 8), (1, 7, 1, 4), (1, 32, 1, 1), (2, 32, 1, 2)]


@pytest.mark.parametrize(("counts", "message"), [({"steps": 0}, "--steps=0"), ({"warmup": -1}, "--warmup=-1")])
def test_numbers_out_of_range_are_refused(tiny, counts, message):
    with pytest.raises(InputError, match=message):
        benchmark_training(tiny, TrainTiming(**counts), [], [])
    with pytest.raises(InputError, match=message):
        benchmark_decoding(tiny, DecodeTiming(**counts), [], [])


def test_the_devices_are_as_many_as_the_largest_point_has():
    assert devices_for(None, None) == devices_for(None, Sweep("batch", (99,))) == jax.devices()
    assert devices_for(3, None) == devices_for(None, Sweep("devices", (1, 3, 2))) == jax.devices()[:3]
    with pytest.raises(ConfigError, match="99 devices are asked for, and there are 8"):
        devices_for(99, None)


def test_several_hosts_measure_all_that_they_have(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert devices_for(None, None) == devices_for(8, None) == jax.devices()
    for count, sweep in ((4, None), (None, Sweep("devices", (4, 8)))):
        with pytest.raises(ConfigError, match="2 hosts are measured with all of their 8 devices"):
            devices_for(count, sweep)
