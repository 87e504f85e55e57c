"""Ratios of two reports, point by point, and what else was different."""

import json

import pytest

from tfm.benchmarking.compare import compare, comparison_table, read_report
from tfm.benchmarking.report import FORMAT
from tfm.config import InputError


def test_ratios_are_the_second_over_the_first(point, report_of):
    found = compare(report_of(), report_of(point(target_tokens_per_second=6000.0, step_seconds_median=0.125)))
    (only,) = found["points"]
    figures = only["figures"]
    assert figures["target_tokens_per_second"] == {"first": 4000.0, "second": 6000.0, "ratio": 1.5}
    assert figures["step_seconds_median"]["ratio"] == 0.5
    assert figures["mfu"]["ratio"] == 1
    assert "mfu_of_published_peak" not in figures  # unknown in both
    assert "rows_per_batch" not in figures  # no figure, but what was measured
    assert found["differences"] == {}


def test_points_are_matched_by_what_they_are(point, report_of):
    first = report_of(*(point(rows_per_batch=n, mfu=n / 100) for n in (1, 2, 4)))
    second = report_of(*(point(rows_per_batch=n, mfu=n / 50) for n in (4, 2, 8)))
    found = compare(first, second)
    assert [p["point"]["rows_per_batch"] for p in found["points"]] == [2, 4]
    assert [p["figures"]["mfu"]["ratio"] for p in found["points"]] == [2, 2]


def test_single_points_are_compared_even_if_the_devices_differ(point, report_of):
    first, second = (
        point(target_tokens_per_second_per_device=0.5),
        point(devices=2, target_tokens_per_second_per_device=0.25),
    )
    found = compare(report_of(first), report_of(second))
    assert len(found["points"]) == 1 and found["differences"] == {"devices": [1, 2]}
    assert found["points"][0]["figures"]["target_tokens_per_second_per_device"]["ratio"] == 0.5


def test_what_points_were_measured_with_is_a_difference(point, report_of):
    first = point(lengths="full", pipeline=False, mesh={"data": 2, "tensor": 1}, rows_per_batch=8)
    second = point(lengths="natural", pipeline=False, mesh={"data": 1, "tensor": 2}, rows_per_batch=8)
    found = compare(report_of(first), report_of(second))
    assert found["differences"] == {"mesh.data": [2, 1], "mesh.tensor": [1, 2], "lengths": ["full", "natural"]}
    assert "lengths: full -> natural" in comparison_table(found)


def test_another_program_is_a_difference(point, report_of):
    first = point(collectives={"all-reduce": 27}, source_padding=0.1, hardware_flops=2e9)
    second = point(collectives={"all-reduce": 300}, source_padding=0.2, hardware_flops=3e9)
    found = compare(report_of(first), report_of(second))
    assert found["differences"] == {"collectives.all-reduce": [27, 300]}
    figures = found["points"][0]["figures"]
    assert (figures["source_padding"]["ratio"], figures["hardware_flops"]["ratio"]) == (2, 1.5)


def test_differences_are_named(report_of):
    found = compare(report_of(), report_of(config={"model": {"d_model": 32}}, versions={"jax": "2", "torch": "1"}))
    assert found["differences"] == {
        "versions.jax": ["1", "2"],
        "versions.torch": [None, "1"],
        "config.model.d_model": [16, 32],
    }
    text = comparison_table(found)
    assert "config.model.d_model: 16 -> 32" in text
    assert "target_tokens_per_second" in text and "1.000" in text


def test_what_cannot_be_compared_is_refused(point, report_of):
    with pytest.raises(InputError, match="benchmark train and the other of benchmark decode"):
        compare(report_of(), report_of(benchmark="decode"))
    with pytest.raises(
        InputError, match="no point in common: devices=1 rows_per_batch=1; devices=1 rows_per_batch=2 in the first"
    ):
        compare(report_of(point(rows_per_batch=1), point(rows_per_batch=2)), report_of(point(rows_per_batch=3)))


def test_a_file_that_is_no_report_is_named(tmp_path, report_of):
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=r"a.json: cannot be read: No such file"):
        read_report(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"a.json: no JSON"):
        read_report(path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"a.json: no report of tfm benchmark"):
        read_report(path)
    path.write_text('{"benchmark": "train", "points": [1]}')
    with pytest.raises(InputError, match=r"a.json: no report of tfm benchmark"):
        read_report(path)
    path.write_text(json.dumps(report_of() | {"format": 1}))
    with pytest.raises(InputError, match=rf"a.json: a report of format 1, and this tfm compares {FORMAT}: measure"):
        read_report(path)
    path.write_text(json.dumps(report_of()))
    assert read_report(path) == report_of()
