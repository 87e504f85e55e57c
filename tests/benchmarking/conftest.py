"""A peak that takes no time to measure, and the tiniest run on synthetic pairs."""

import pytest

from tfm.config import Config, DataConfig, DecodingConfig, ModelConfig, TrainingConfig


@pytest.fixture(scope="session")
def make_peak():
    from tfm.benchmarking.peak import MatmulPeak

    return lambda devices, dtype: MatmulPeak(devices, dtype, sizes=(32, 64), seconds=0.001)


@pytest.fixture(scope="session")
def tiny() -> Config:
    return Config(
        model=ModelConfig(d_model=16, d_ff=32, num_heads=2, encoder_layers=2, decoder_layers=2, dropout_rate=0.1),
        data=DataConfig(vocab_size=100, source_row_length=32, target_row_length=48),
        training=TrainingConfig(target_tokens_per_batch=8 * 48),
        decoding=DecodingConfig(beam_size=2, max_source_length=16, tokens_per_batch=32),
    ).validate()


@pytest.fixture
def point():
    """A point of a report, as far as tables, pictures and comparisons look at it."""

    def make(**changes):
        values = {
            "devices": 1,
            "rows_per_batch": 8,
            "compile_seconds": 2.5,
            "step_seconds_median": 0.25,
            "target_tokens_per_second": 4000.0,
            "sentences_per_second": 100.0,
            "model_flops_per_second": 2e9,
            "mfu": 0.2,
            "mfu_of_published_peak": None,
            "matmul_peak_flops": 1e10,
            "peak_device_memory_bytes": 2**20,
        }
        return values | changes

    return make


@pytest.fixture
def report_of(point):
    """A report of `tfm benchmark train` with these points."""
    from tfm.benchmarking.report import FORMAT

    def make(*points, **changes):
        values = {
            "format": FORMAT,
            "benchmark": "train",
            "device": {"device_kind": "cpu"},
            "versions": {"jax": "1"},
            "config": {"model": {"d_model": 16}},
            "points": list(points) or [point()],
        }
        return values | changes

    return make
