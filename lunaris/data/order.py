"""Permutations of 0 … N−1 that are computed, not stored: a Feistel network with cycle walking.

Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Return each index's place in the permutation of 0 … size−1 keyed by (seed, its epoch).

    index, epoch: [R] int64 with 0 <= index < size. Returns [R] int64. Time O(R), no tables.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    place = _feistel(index.astype(np.uint64), half, keys)
    # The network permutes 4^half >= size numbers, less than 4 · size of them: walk on where it
    # leaves the domain. The walk ends, for it follows a cycle that holds the start.
    while (outside := place >= size).any():
        place[outside] = _feistel(place[outside], half, [key[outside] for key in keys])
    return place.astype(np.int64)


def _feistel(value: np.ndarray, half: int, keys: list[np.ndarray]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epoch: np.ndarray) -> list[np.ndarray]:
    """Return one key for each round and row ([R] uint64)."""
    state = _mix(np.full(len(epoch), seed % 2**64, dtype=np.uint64))
    state = _mix(state ^ epoch.astype(np.uint64))
    keys = []
    for _ in range(_ROUNDS):
        state = state + _GOLDEN
        keys.append(_mix(state))
    return keys


def _mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's output function of x (uint64, wrapping)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
