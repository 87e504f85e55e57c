"""Memory that is too small is said in one line, with what was asked for and what there is."""

import os

import jax
import pytest

from tfm import device_memory
from tfm.config import InputError
from tfm.device_memory import OutOfDeviceMemory


class Device:
    platform, device_kind = "gpu", "Card"

    def memory_stats(self):
        return {"bytes_limit": 3 * 2**30}


def test_the_room_is_what_the_allocator_has_and_on_a_cpu_a_share_of_the_system_s():
    assert device_memory.room_of(Device()) == 3 * 2**30
    room = device_memory.room_of(jax.devices("cpu")[0])
    assert room == device_memory.room_of(jax.devices("cpu")[-1])
    assert 8 * room == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01)


def test_a_program_that_is_too_large_is_refused_and_one_that_fits_is_not():
    device_memory.refuse_larger("this", 3 * 2**30, Device())
    device_memory.refuse_larger("this", None, Device())
    with pytest.raises(OutOfDeviceMemory, match=r"^this: needs 4.5 GiB on a device, and 3.0 GiB are there$") as caught:
        device_memory.refuse_larger("this", int(4.5 * 2**30), Device())
    assert (caught.value.needed, caught.value.room) == (int(4.5 * 2**30), 3 * 2**30)


def test_the_machine_s_own_memory_is_told_apart(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with (
        pytest.raises(InputError, match=r"^a batch: this machine's own memory has run out, not its devices'$"),
        device_memory.explained("a batch", "take less"),
    ):
        raise MemoryError


@pytest.mark.parametrize(
    ("error", "platform"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes\nmore"), "gpu"),
        (MemoryError(), "cpu"),
    ],
)
def test_memory_that_runs_out_is_wrong_input(error, platform, monkeypatch):
    monkeypatch.setattr(Device, "platform", platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with (
        pytest.raises(
            InputError, match=r"^a batch: the memory of 3.0 GiB of Card has run out \(.*\): take less$"
        ) as it,
        device_memory.explained("a batch", "take less"),
    ):
        raise error
    assert "\n" not in str(it.value) and it.value.__cause__ is error


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), device_memory.explained("a batch"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
