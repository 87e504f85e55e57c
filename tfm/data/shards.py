"""Pairs of token ids on disk and in memory: shards, tables of pairs, and the writer of a store.

A shard is one file of up to a million pairs: source and target token ids, end to end; their lengths; and where each
pair begins. It is memory-mapped, so that only what is read is ever in memory: of 100 million pairs, planning an epoch
touches the lengths alone (4 bytes a pair).
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tfm.data.tokenizer import Tokenizer
from tfm.files import write_atomically

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"
SHARD_PAIRS = 1_000_000
_SHARD_TOKENS = 1 << 27  # of one side: half a gigabyte at most, since a shard is put together in memory
_ALIGNMENT = 64
# Reading a pair brings the surroundings of four places into the process's memory, of each up to 64 KiB, or as much as
# the kernel keeps in one piece (2 MiB at most). Tables large enough for that to matter let go of them now and then.
_RESIDENT_BYTES = 3 << 28
_READS = 128
Side = Literal["source", "target"]
SIDES: tuple[Side, Side] = ("source", "target")
Ints = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some pairs: token ids end to end [tokens], and lengths and offsets into them [pairs], of each side."""

    tokens: dict[str, Ints]
    lengths: dict[str, Ints]
    offsets: dict[str, Ints]
    mapping: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.lengths["source"])

    def side(self, side: Side, index: int) -> Ints:
        """Token ids [tokens] of one side of a pair."""
        offsets, tokens = self.offsets[side], self.tokens[side]
        stop = offsets[index + 1] if index + 1 < len(offsets) else len(tokens)
        return tokens[offsets[index] : stop]

    def release(self) -> None:
        """Gives the memory of the pages that were read back; they are mapped again when they are read again."""
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)

    @classmethod
    def from_tokens(cls, tokens: dict[str, Ints], lengths: dict[str, Ints]) -> Shard:
        """A shard out of flat tokens and lengths; offsets follow from the lengths."""
        offsets = {side: np.cumsum(lengths[side], dtype=np.int64) - lengths[side] for side in SIDES}
        return cls(tokens, lengths, {side: offsets[side].astype(np.uint32) for side in SIDES})


class PairTable:
    """The pairs of one corpus and split, in its order. Both sides end in EOS, which their lengths count."""

    def __init__(self, name: str, weight: float, shards: Sequence[Shard]):
        self.name = name
        self.weight = weight
        self._shards = list(shards)
        self._starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])]).astype(np.int64)
        self._start_list = self._starts.tolist()
        self._reads = 0
        self._releases = sum(len(shard.mapping) for shard in shards if shard.mapping is not None) > _RESIDENT_BYTES

    def __len__(self) -> int:
        return self._start_list[-1]

    def pair(self, index: int) -> tuple[Ints, Ints]:
        """Source and target ids of pair `index`, each ending in EOS. Raises IndexError outside the table."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)} in {self.name}")
        self._reads += 1
        if self._releases and self._reads % _READS == 0:
            for shard in self._shards:
                shard.release()
        number = bisect.bisect_right(self._start_list, index) - 1
        shard, within = self._shards[number], index - self._start_list[number]
        return shard.side("source", within), shard.side("target", within)

    def lengths(self, side: Side, indices: Ints) -> npt.NDArray[np.int32]:
        """Lengths in tokens of one side of the pairs `indices` [n], in their order."""
        indices = np.asarray(indices)
        out = np.empty(len(indices), np.int32)
        if len(self._shards) == 1:
            out[:] = self._shards[0].lengths[side][indices]
            return out
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(numbers.astype(np.uint16), kind="stable")  # 16 bits: a radix sort
        bounds = np.searchsorted(numbers[order], np.arange(len(self._shards) + 1))
        for number, shard in enumerate(self._shards):
            here = order[bounds[number] : bounds[number + 1]]
            out[here] = shard.lengths[side][indices[here] - self._starts[number]]
        return out


class StoreWriter:
    """Writes a store into an empty directory, table after table; `finish` writes the manifest."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self.directory = directory
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.files: dict[str, dict[str, Any]] = {}
        self.tables: list[dict[str, Any]] = []
        self._chunks: list[tuple[dict[str, Ints], dict[str, Ints]]] = []
        self.add_file(TOKENIZER, tokenizer.model)

    def add_file(self, name: str, content: bytes) -> None:
        """Writes a small file, and notes it for the manifest."""
        (self.directory / name).write_bytes(content)
        self.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def start_table(self, name: str, split: str, weight: float = 1.0) -> None:
        """Begins the next table; `append` fills it."""
        self._flush()
        self.tables.append({"name": name, "split": split, "weight": weight, "pairs": 0, "shards": [], "text": []})

    def append(self, source_tokens: Ints, source_lengths: Ints, target_tokens: Ints, target_lengths: Ints) -> None:
        """Adds pairs: tokens end to end, each sentence with its EOS, and lengths that count it."""
        if not len(source_lengths):
            return
        self._chunks.append(
            (
                {"source": source_tokens.astype(self.dtype), "target": target_tokens.astype(self.dtype)},
                {"source": source_lengths, "target": target_lengths},
            )
        )
        pairs = sum(len(lengths["source"]) for _, lengths in self._chunks)
        tokens = max(sum(len(tokens[side]) for tokens, _ in self._chunks) for side in SIDES)
        if pairs >= SHARD_PAIRS or tokens >= _SHARD_TOKENS:
            self._flush()

    def add_text(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Stores the text of the current table's pairs, for scores."""
        table = self.tables[-1]
        sides = zip(*pairs, strict=True)
        for side, lines in zip(SIDES, sides, strict=True):
            name = f"{self._stem()}.{side}"
            self.add_file(name, "".join(line + "\n" for line in lines).encode())
            table["text"].append(name)

    def _stem(self) -> str:
        """Start of the names of the current table's files; a split may hold any character, such as train[:10%]."""
        return f"{len(self.tables) - 1}-{re.sub('[^A-Za-z0-9_.-]+', '_', self.tables[-1]['split'])}"

    def _flush(self) -> None:
        if not self._chunks:
            return
        table = self.tables[-1]
        tokens = {side: np.concatenate([chunk[side] for chunk, _ in self._chunks]) for side in SIDES}
        lengths = {side: np.concatenate([chunk[side] for _, chunk in self._chunks]) for side in SIDES}
        self._chunks = []
        longest = max(int(lengths[side].max(initial=0)) for side in SIDES)
        lengths = {side: lengths[side].astype(np.uint16 if longest < 1 << 16 else np.uint32) for side in SIDES}
        shard = Shard.from_tokens(tokens, lengths)
        name = f"{self._stem()}-{len(table['shards']):05d}.shard"
        size, digest, arrays = _write_shard(self.directory / name, shard)
        self.files[name] = {"bytes": size, "sha256": digest}
        table["shards"].append({"file": name, "pairs": len(shard), "sha256": digest, "arrays": arrays})
        table["pairs"] += len(shard)

    def finish(self, **facts: Any) -> None:
        """Writes the last shard and then the manifest, with `facts` (JSON values) in it."""
        self._flush()
        manifest = {"format": FORMAT, **facts, "tables": self.tables, "files": self.files}
        write_atomically(self.directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _write_shard(path: Path, shard: Shard) -> tuple[int, str, dict[str, Any]]:
    """Writes one shard; returns its bytes, its SHA-256, and {name: [type, count, position]} of its arrays."""
    arrays: dict[str, Any] = {}
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for kind in ("offsets", "lengths", "tokens"):
            for side in SIDES:
                array = np.ascontiguousarray(getattr(shard, kind)[side])
                array = array.astype(array.dtype.newbyteorder("<"), copy=False)
                arrays[f"{side}_{kind}"] = [array.dtype.str, len(array), file.tell()]
                content = array.tobytes() + bytes(-array.nbytes % _ALIGNMENT)
                digest.update(content)
                file.write(content)
        return file.tell(), digest.hexdigest(), arrays


def map_shard(path: Path, arrays: dict[str, Any]) -> Shard:
    """Maps one shard's file into memory, read-only."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    views: dict[str, dict[str, Ints]] = {"tokens": {}, "lengths": {}, "offsets": {}}
    for name, (dtype, count, position) in arrays.items():
        side, kind = name.split("_")
        views[kind][side] = np.frombuffer(mapping, dtype, count, position)
    return Shard(**views, mapping=mapping)
