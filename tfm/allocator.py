"""How the C library deals with freed memory, which decides a fifth of the time of a small model's step on a CPU."""

from __future__ import annotations

import ctypes
import glob
import os
from importlib.metadata import entry_points
from importlib.util import find_spec

# Options of glibc's mallopt(3): M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never) and M_TOP_PAD.
_KEEP_FREED = {-8: 1, -4: 0, -1: -1, -2: 64 * 2**20}


def keep_freed_memory() -> None:
    """Has the C library keep what is freed instead of giving it back to the system: on a CPU, with glibc.

    There, XLA allocates its temporary buffers anew in each step. They are large, so that each would be mapped, filled
    with zeros page by page, and unmapped again: a fifth to a quarter of all time, measured on small models.

    One arena, since those of threads are mapped and unmapped whatever the other options say. A thread that has an arena
    keeps it, and some of the threads after it are given the same, so this has to come before any thread: one of
    Python's is enough to make XLA's a third slower, in most processes and not in others.
    """
    if _has_accelerator() and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in _KEEP_FREED.items():
        mallopt(option, value)


def give_back_freed_memory() -> None:
    """Gives what is free now back to the system, wherever it lies between what is not; glibc alone can.

    Kept memory falls to pieces where large buffers of several sizes come and go beside small things that stay, and
    grows by a buffer now and then.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _has_accelerator() -> bool:
    """libtpu alone is none: `tfm plan` compiles with it where there is no TPU."""
    has_tpu = any(glob.glob(place) for place in ("/dev/accel*", "/dev/vfio/[0-9]*"))
    return bool(entry_points(group="jax_plugins")) or (has_tpu and find_spec("libtpu") is not None)
