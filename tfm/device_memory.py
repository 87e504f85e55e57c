"""Device memory: how much there is, and what is said where a program needs more of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from tfm.config import InputError

TRANSLATING = ("a batch of sentences", "lower decoding.tokens_per_batch (or beam_size, n_best, max_extra_tokens)")
"""What runs out of memory where sentences are translated, and what helps."""
SCORING = ("a batch of sentences", "lower decoding.tokens_per_batch or decoding.max_source_length")
"""The same where translations are scored."""

_GIB = 2**30


class OutOfDeviceMemory(InputError):
    """A program does not fit on its devices; `needed` and `room` are bytes a device, None where nobody says."""

    def __init__(self, message: str, needed: int | None = None, room: int | None = None):
        super().__init__(message)
        self.needed, self.room = needed, room


def room_of(device: Any) -> int | None:
    """Bytes that a device of this host has for programs; None where nobody says.

    Of a CPU, what the machine has, in equal shares where one CPU stands for several devices.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return share_of_the_machine() if limit is None and device.platform == "cpu" else limit


def share_of_the_machine() -> int:
    """Bytes of the machine's own memory for each of this host's devices."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def refuse_larger(what: str, needed: int | None, device: Any) -> None:
    """Raises OutOfDeviceMemory where a program that takes `needed` bytes a device is too large for it."""
    room = room_of(device)
    if needed is not None and room is not None and needed > room:
        message = f"{what}: needs {needed / _GIB:,.1f} GiB on a device, and {room / _GIB:,.1f} GiB are there"
        raise OutOfDeviceMemory(message, needed, room)


@contextlib.contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turns JAX's error for memory that has run out into an OutOfDeviceMemory: `what` did not fit, `remedy` helps."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        first_line = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in first_line:
            raise
        device = jax.local_devices()[0]
        if isinstance(error, MemoryError) and device.platform != "cpu":
            raise OutOfDeviceMemory(f"{what}: this machine's own memory has run out, not its devices'") from error
        room = room_of(device)
        there = "" if room is None else f" of {room / _GIB:,.1f} GiB"
        message = f"{what}: the memory{there} of {device.device_kind} has run out ({first_line or 'MemoryError'})"
        raise OutOfDeviceMemory(f"{message}: {remedy}" if remedy else message, None, room) from error
