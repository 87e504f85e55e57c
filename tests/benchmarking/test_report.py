"""Tables that line up, JSON that is written or refused."""

import json
import platform

import jax

from tfm.benchmarking.report import as_json, device, profile_table, table, versions


def test_a_table_has_a_line_for_each_point_and_only_what_there_is(point):
    lines = table([point(), point(target_tokens_per_second=12345.6, mfu=None)]).split("\n")
    assert len(lines) == 3
    assert "target tokens/s" in lines[0] and "beam" not in lines[0]
    assert "12,346" in lines[2] and "20.0" in lines[1]
    assert " - " in lines[2]
    ends = [line.index(text) + len(text) for line, text in zip(lines, ("tokens/s", "4,000", "12,346"), strict=True)]
    assert len(set(ends)) == 1


def test_the_table_of_a_profile():
    text = profile_table([{"part": "decoder", "seconds": 0.0125, "share": 0.75, "operations": 3.0}])
    assert text.split("\n")[1].split() == ["decoder", "12.500", "75.0", "3"]


def test_what_is_no_number_is_null():
    report = {"points": [{"loss": float("nan"), "mfu": 0.5}]}
    assert json.loads(as_json(report)) == {"points": [{"loss": None, "mfu": 0.5}]}


def test_versions_are_of_what_decides_about_speed():
    assert {"tfm", "python", "jax", "jaxlib", "numpy"} <= set(versions())


def test_the_build_of_the_kernel_is_nobody_s_business():
    told = device(jax.devices()[0])["host_system"]
    assert platform.machine() in told and platform.release() not in told


def test_what_the_environment_decides_is_told(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("SOMETHING_ELSE", "secret")
    environment = device(jax.devices()[0])["environment"]
    assert environment["JAX_NUM_CPU_DEVICES"] == "2" and "XLA_FLAGS" in environment
    assert "SOMETHING_ELSE" not in environment
