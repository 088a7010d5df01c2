"""Permutations of 0 … N−1 that are computed, not stored: a Feistel network with cycle walking.

Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002).
"""

from __future__ import annotations

import functools
import math

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(29)
_HALF = np.uint64(32)


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Return each index's place in the permutation of 0 … size−1 keyed by (seed, its epoch).

    index, epoch: [R] int64 with 0 <= index < size. Returns [R] int64. Time O(R), no tables.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(seed, epoch)
    place = _feistel(index.astype(np.uint64), rows, columns, keys)
    # The network permutes rows · columns >= size numbers, hardly more than `size`. Apply it again
    # while the result is outside; that ends, because the cycle returns to the start.
    while (outside := place >= size).any():
        some = keys if keys[0].size == 1 else [key[outside] for key in keys]
        place[outside] = _feistel(place[outside], rows, columns, some)
    return place.astype(np.int64)


def _feistel(value: np.ndarray, rows: int, columns: int, keys: list[np.ndarray]) -> np.ndarray:
    """Permute rows · columns numbers: a hash of one half shifts the other, in turn."""
    m, n = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(value, n)
    for i, key in enumerate(keys):
        if i % 2:
            shift = _hash(row, key, n)
            column += shift
            column %= n
        else:
            shift = _hash(column, key, m)
            row += shift
            row %= m
    row *= n
    row += column
    return row


def _hash(half: np.ndarray, key: np.ndarray, below: np.uint64) -> np.ndarray:
    """Return a number below `below` (at most 2^32) that depends on a half and the round's key."""
    x = half + key
    x *= _MULTIPLIER_1
    x ^= x >> _SHIFT
    x *= _MULTIPLIER_2
    x >>= _HALF
    x *= below
    x >>= _HALF
    return x


def _round_keys(seed: int, epoch: np.ndarray) -> list[np.ndarray]:
    """Return each round's keys: one for each row, or one for all rows of the same epoch."""
    first = int(epoch[0]) if len(epoch) else 0
    if (epoch == first).all():
        return _epoch_keys(seed, first)
    epochs, which = np.unique(epoch, return_inverse=True)
    each = [_epoch_keys(seed, int(one)) for one in epochs]
    return [np.concatenate(keys)[which] for keys in zip(*each, strict=True)]


@functools.lru_cache(maxsize=1024)
def _epoch_keys(seed: int, epoch: int) -> list[np.ndarray]:
    """Return one key for each round ([1] uint64 each)."""
    state = _mix(np.array([seed % 2**64], dtype=np.uint64))
    state = _mix(state ^ np.array([epoch], dtype=np.uint64))
    keys = []
    for _ in range(_ROUNDS):
        state = state + _GOLDEN
        keys.append(_mix(state))
    return keys


def _mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's output function of x (uint64, wrapping)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))
