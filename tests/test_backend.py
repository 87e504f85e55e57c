"""How many devices a process takes, and where it keeps compiled programs."""

import os

import jax
import pytest

from tfm import backend
from tfm.config import ConfigError


@pytest.fixture
def settings(monkeypatch):
    """What is asked of JAX, which is not told."""
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    return asked


def test_the_first_devices_are_as_many_as_asked_for():
    assert backend.first_devices(None) == jax.devices()
    assert backend.first_devices(3) == jax.devices()[:3]
    with pytest.raises(ConfigError, match="9 devices are asked for, and there are 8"):
        backend.first_devices(9)
    with pytest.raises(ConfigError, match="at least one"):
        backend.first_devices(0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 3), ({"JAX_NUM_CPU_DEVICES": "1"}, None), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, None)],
)
def test_each_core_is_a_device_of_decoding_unless_someone_said_otherwise(environment, expected, monkeypatch, settings):
    monkeypatch.delenv("XLA_FLAGS")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    backend.decode_on_every_core()
    assert settings.get("jax_num_cpu_devices") == expected


def test_compiled_programs_are_kept_in_the_user_s_cache(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend.use_compilation_cache()  # the tests have a place of their own
    assert settings == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    backend.use_compilation_cache()
    assert settings["jax_compilation_cache_dir"].startswith(f"{tmp_path}/tfm/")
