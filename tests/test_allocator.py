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


def test_it_is_asked_for_before_libraries_are_imported():
    """Later, a thread of theirs may have made an arena of its own, which new threads would be given."""
    program = """
    import sys
    from tfm import __main__

    def keep():
        print(sorted({"jax", "numpy"} & sys.modules.keys()))
        raise SystemExit

    __main__.keep_freed_memory = keep
    __main__.main(["train", "--workdir=never"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
