"""Two processes of one program save, check and restore one state together."""

import socket
import subprocess
import sys

import pytest

from tfm.checkpoint import RunDirectory
from tfm.config import Config

PROGRAM = """
import logging, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tfm.checkpoint import Checkpointer, RunDirectory

logging.basicConfig(stream=sys.stdout, format="%(message)s")
address, index, path, task = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

def state(step):
    values = step * np.arange(24.0, dtype=np.float32).reshape(8, 3)
    w = jax.make_array_from_callback((8, 3), split, lambda at: values[at])
    return {"parameters": {"w": w}, "step": jax.make_array_from_callback((), whole, lambda at: np.int32(step))}

with Checkpointer(RunDirectory.open(path), keep_last=2) as checkpointer:
    if task == "save":
        for step in (1, 2, 3):
            checkpointer.save(step, state(step))
    restored = checkpointer.resume(state(0))
    for mine, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state(restored.step)), strict=True):
        assert mine.sharding == expected.sharding
        for a, b in zip(mine.addressable_shards, expected.addressable_shards, strict=True):
            assert np.array_equal(a.data, b.data)
    print("restored", restored.step, flush=True)
"""


def together(path, task: str) -> list[str]:
    """What each of the two processes printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index), path, task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return RunDirectory.create(tmp_path_factory.mktemp("processes") / "run", Config()).path


def test_two_processes_save_together_and_agree_on_what_is_damaged(path):
    for output in together(path, "save"):
        assert output.endswith("restored 3\n")
    assert {entry.name for entry in (path / "checkpoints").iterdir()} == {"2", "3"}
    arrays = sorted((path / "checkpoints" / "3" / "parameters").rglob("ocdbt.process_*/d/*"))
    assert len(arrays) == 2  # each wrote its own
    data = bytearray(arrays[0].read_bytes())
    data[-1] ^= 1
    arrays[0].write_bytes(data)
    outputs = together(path, "resume")
    assert all(output.endswith("restored 2\n") and "3: damaged, not used" in output for output in outputs)
    assert sum(f"{arrays[0].name} has other content" in output for output in outputs) == 1  # one of them reads it
    assert {entry.name for entry in (path / "checkpoints" / "damaged").iterdir()} == {"3"}
