"""The order in which a run trains on its sequences: all, without ranges left out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SequenceOrder:
    """The sequences 0, 1, 2, … without those of `left_out`, pairs of a first and a last one.

    A position in it is the number of the next sequence, so that leaving out what lies behind a
    position changes nothing.
    """

    left_out: tuple[tuple[int, int], ...] = ()

    @classmethod
    def without(cls, ranges: Iterable[tuple[int, int]]) -> SequenceOrder:
        """Return the order without `ranges`, which may overlap."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    def take(self, position: int, counts: np.ndarray) -> np.ndarray:
        """Return the sequences ([R] int64) that come `counts` ([R] int64) places after `position`.

        0 is the first sequence from `position` on that is not left out.
        """
        n = position + counts
        for first, last in self.left_out:
            if last >= position:
                begin = max(first, position)
                n = np.where(n >= begin, n + (last + 1 - begin), n)
        return n

    def first_and_last(self, position: int, count: int) -> tuple[int, int]:
        """Return the first and the last of the next `count` sequences from `position` on."""
        first, last = self.take(position, np.array([0, count - 1])).tolist()
        return first, last
