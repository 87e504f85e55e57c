"""What is freed stays with the process: seen by the pages that have to be mapped anew."""

import subprocess
import sys
import textwrap

import pytest

# Allocates {size} bytes, fills 96 MiB of them and frees them, again and again, in a thread, as XLA does in each step.
CHURN = """
import ctypes, resource, sys, threading
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = []

def churn():
    for _ in range(6):
        buffer = libc.malloc({size})
        libc.memset(buffer, 1, 96 * 2**20)
        libc.free(buffer)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

thread = threading.Thread(target=churn)
thread.start()
thread.join()
print(faults[-1] - faults[0])
"""

KEEP = "from tfm.allocator import keep_freed_memory; keep_freed_memory()"


def pages_mapped_anew(before: str, size: int) -> int:
    program = CHURN.format(before=textwrap.dedent(before), size=size)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the option is glibc's")
@pytest.mark.parametrize("size", [96 * 2**20, 3 * 2**30])
def test_freed_memory_is_kept(size):
    assert pages_mapped_anew(KEEP, size) < 100 < pages_mapped_anew("", size)


def test_it_is_asked_for_before_any_thread_starts():
    """Later, the thread may have made an arena of its own, which some of the threads after it would be given."""
    program = """
    import sys, threading
    from tfm import __main__

    def keep():
        print(sorted({"jax", "numpy"} & sys.modules.keys()), threading.active_count())
        raise SystemExit

    __main__.keep_freed_memory = keep
    __main__.main(["train", "--workdir=never"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[] 1\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the option is glibc's")
def test_what_is_kept_can_be_given_back():
    """A hole of 96 MiB below something that stays: no end of the heap that could be cut off."""
    program = """
    import ctypes
    from tfm.allocator import give_back_freed_memory, keep_freed_memory
    keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    hole, stays = libc.malloc(96 * 2**20), libc.malloc(2**20)
    libc.memset(hole, 1, 96 * 2**20)
    full = resident()
    libc.free(hole)
    kept = resident()
    give_back_freed_memory()
    print(full - kept, full - resident())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    by_itself, asked = map(int, done.stdout.split())
    assert by_itself < 2**20 and asked > 90 * 2**20
