"""The picture of a sweep is written, for either benchmark."""

import pytest

from tfm.benchmarking.picture import draw
from tfm.config import InputError


@pytest.mark.parametrize("axis", ["batch", "devices"])
def test_a_sweep_is_drawn(axis, point, report_of, tmp_path):
    points = [point(**{axis: value}, target_tokens_per_second=10.0 * value) for value in (1, 2, 8)]
    draw(report_of(*points, sweep={"axis": axis, "values": [1, 2, 8]}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_has_a_line_for_each_beam_and_the_published_peak(point, report_of, tmp_path):
    points = [point(length=length, beam_size=beam, mfu_of_published_peak=0.1) for beam in (1, 4) for length in (16, 32)]
    report = report_of(*points, sweep={"axis": "length", "values": [16, 32]}, benchmark="decode")
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_is_named(point, report_of, tmp_path):
    with pytest.raises(InputError, match=r"none/a.png: cannot be written"):
        draw(report_of(point(batch=1), sweep={"axis": "batch", "values": [1]}), tmp_path / "none" / "a.png")
