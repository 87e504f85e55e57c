"""Random order without random state: keys, a hash, and a permutation that is computed number by number."""

from __future__ import annotations

import hashlib
import math

import numpy as np


def derive_key(*parts: object) -> int:
    """64-bit key of those parts; other parts, or the same in another order, give an unrelated key."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash64(numbers: np.ndarray, key: int) -> np.ndarray:
    """uint64 hash of each number under a key: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed bijection of 0..size-1 that stores nothing: a Feistel network on the smallest square that holds them.

    A number is split into two digits of base ceil(sqrt(size)), and each round adds a hash of one digit to the other
    (a generalised Feistel network; Black and Rogaway, 2002, "Ciphers with Arbitrary Finite Domains"). Numbers that
    land outside the range are sent through again (cycle walking) until they are inside.
    """

    ROUNDS = 8
    BLOCK = 1 << 15  # numbers at a time, so that the rounds' arrays stay in the processor's cache

    def __init__(self, size: int, key: int):
        self.size = size
        self._base = math.isqrt(max(size, 1) - 1) + 1
        self._keys = [derive_key(key, number) for number in range(self.ROUNDS)]

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Images of those numbers, int64 [any length]; each must be in 0..size-1."""
        numbers = np.asarray(numbers)
        blocks = [self._walk(numbers[start : start + self.BLOCK]) for start in range(0, len(numbers), self.BLOCK)]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)

    def _walk(self, numbers: np.ndarray) -> np.ndarray:
        images = self._encrypt(numbers.astype(np.uint64))
        while len(outside := np.flatnonzero(images >= self.size)):
            images[outside] = self._encrypt(images[outside])
        return images.astype(np.int64)

    def _encrypt(self, numbers: np.ndarray) -> np.ndarray:
        base = np.uint64(self._base)
        left = numbers // base
        right = numbers - left * base
        for key in self._keys:
            # The hash's upper half, scaled to 0..base-1 by a multiplication in place of a slow remainder.
            moved = left + (((hash64(right, key) >> np.uint64(32)) * base) >> np.uint64(32))
            left, right = right, np.minimum(moved, moved - base)  # below base, moved - base wraps to a huge number
        return left * base + right
