"""How rows of several experts fit into blocks of one size, from what a host knows. No torch.

Legend: N rows (assignments), E experts, C rows of a block, M blocks beyond each expert's first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index

# Rows a block for which reading an expert's weights takes about as long as multiplying by them.
_BALANCED = 512


@dataclass(frozen=True)
class Blocks:
    """E first blocks, one an expert, and `extra` more (M) of `rows` rows each (C)."""

    rows: int
    extra: int

    def total(self, n_experts: int) -> int:
        """Return the rows of all blocks, (E + M) · C."""
        return (n_experts + self.extra) * self.rows


def capacity_of(assignments: int, n_experts: int, factor: float) -> int:
    """Return how many of a sequence's assignments an expert takes at a capacity factor."""
    return math.ceil(min(factor * assignments / n_experts, assignments))


def blocks_for(n_rows: int, n_experts: int, most: int) -> Blocks:
    """Return blocks that hold N rows however they are routed, each block rows of one expert.

    most: rows that no expert exceeds, whatever the router does.

    An expert of n rows needs ceil(n / C) - 1 ≤ (n - 1) / C blocks beyond its first one, so that
    M = (N - 1) // C is enough for any loads. The products then have E·C + N rows instead of N, and
    M blocks need copies of their experts' weights. With a mean load of n rows and C = n / m that is
    1 + 1 / m times the work and m copies of all weights. A copy is written and read twice, which is
    3s bytes for an element of s bytes, against 2n operations; their sum is least where C is the
    geometric mean of n and 1.5·s·(FLOP/s over bytes/s): 470 rows in bf16 on an A100, 1,260 on an
    L40S. Blocks of less than a mean load would pad more than they save.
    """
    # Plain numbers: a compiler that reasons about sizes would carry this arithmetic everywhere.
    n_rows, most = index(n_rows), index(most)
    mean = n_rows / n_experts
    rows = math.ceil(min(mean, math.sqrt(_BALANCED * mean)))
    # Kernels multiply tiles of 64 rows and more.
    rows += -rows % (64 if rows > 32 else 8)
    rows = max(1, min(rows, most))
    extra = min(max(0, n_rows - 1) // rows, n_experts * (max(0, most - 1) // rows))
    if most <= rows or most * n_experts <= (n_experts + extra) * rows:
        return Blocks(max(1, most), 0)
    return Blocks(rows, extra)
