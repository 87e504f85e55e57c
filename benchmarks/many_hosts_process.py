"""What each process of `many_hosts.py` runs: `tfm train`, with a line for each batch that it puts on its devices.

    BATCH_HASHES=FILE python benchmarks/many_hosts_process.py [OPTIONS of tfm train]

A line of FILE is the number of a batch and, by row of the global batch, the SHA-256 of all fields of the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import numpy as np

from tfm.__main__ import main
from tfm.data.batches import Batch, TrainBatches

_global_batch = TrainBatches.global_batch


def hashed(self: TrainBatches, k: int, sharding: Any) -> Batch:
    """Batch k as it is, once the rows of it that lie on this process's devices are hashed."""
    batch = _global_batch(self, k, sharding)
    rows: dict[int, Any] = {}
    for name, field in sorted(batch._asdict().items()):
        parts: dict[int, set[bytes]] = {}
        for shard in field.addressable_shards:
            first = shard.index[0].indices(field.shape[0])[0]
            for i, row in enumerate(np.asarray(shard.data)):
                parts.setdefault(first + i, set()).add(row.tobytes())
        for row, contents in parts.items():
            (content,) = contents  # devices that hold the same row agree
            rows.setdefault(row, hashlib.sha256()).update(name.encode() + content)
    line = json.dumps({"batch": k, "rows": {row: digest.hexdigest() for row, digest in rows.items()}})
    with open(os.environ["BATCH_HASHES"], "ab", buffering=0) as file:
        file.write(line.encode() + b"\n")
    return batch


if __name__ == "__main__":
    TrainBatches.global_batch = hashed
    sys.exit(main(["train", *sys.argv[1:]]))
