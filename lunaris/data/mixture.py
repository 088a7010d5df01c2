"""Several sources mixed into one series of sequences, in given proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lunaris.data.base import Sequences, is_masked
from lunaris.data.shuffle import permute

# Slots of a block. Every block gives a source the same number of slots, so that its share is exact
# to half a slot in a million.
_BLOCK = 2**20


class MixedSequences:
    """Sequences of several sources, mixed by weight; a pure function of n, with no state.

    Block b of 2^20 places is a permutation of its slots, keyed by (seed, b); slot s belongs to the
    source whose range holds it. So the n-th sequence's source, and its number within that source,
    have a closed form. A source that runs out begins its next epoch.
    """

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[float], seed: int) -> None:
        """weights: one for each part, above 0; they need not sum to 1."""
        self._parts = list(parts)
        self.seq_len = self._parts[0].seq_len
        self.masked = any(is_masked(part) for part in self._parts)
        self._counts = slots(np.asarray(weights, dtype=np.float64))
        self._ends = np.cumsum(self._counts)
        self._seed = seed

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def _locate(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each sequence's source and its number within that source (both [R] int64)."""
        block, place = np.divmod(n, _BLOCK)
        # A different key from that of the permutations within the sources.
        slot = permute(place, _BLOCK, self._seed ^ 0x6D6978, block)
        source = np.searchsorted(self._ends, slot, side="right")
        count = self._counts[source]
        return source, block * count + slot - (self._ends[source] - count)

    def source(self, n: np.ndarray) -> np.ndarray:
        """Return the index of each sequence's source ([R] int64)."""
        return self._locate(n)[0]

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        """Write the n-th sequences (n: [R] int64) to out ([R, seq_len + 1])."""
        source, number = self._locate(n)
        for i in np.unique(source):
            rows = np.flatnonzero(source == i)
            part = np.empty((len(rows), out.shape[1]), dtype=out.dtype)
            self._parts[i].gather(number[rows], part)
            if self.masked and not is_masked(self._parts[i]):
                # A negative id, which is wrong, must not pass for a masked token.
                part[part < 0] = np.iinfo(np.int64).min
            out[rows] = part

    def describe(self, n: int) -> str:
        """Return what the n-th sequence's source says of it, for messages."""
        source, number = self._locate(np.array([n]))
        return self._parts[int(source[0])].describe(int(number[0]))


def slots(weights: np.ndarray) -> np.ndarray:
    """Return how many of a block's slots each source gets ([S] int64, at least 1 each)."""
    exact = weights / weights.sum() * _BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    # The largest remainders take what rounding left over; the largest source gives what is missing.
    left = _BLOCK - int(counts.sum())
    if left > 0:
        counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    elif left < 0:
        counts[np.argmax(counts)] += left
    assert counts.sum() == _BLOCK and (counts > 0).all()
    return counts
