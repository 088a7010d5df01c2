"""The job arrays of a sweep that is larger than SLURM's largest array."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """An array of `size` points of a sweep, of which `parallelism` run at a time.

    after: the number of the part that must have ended before this one starts, or None.
    """

    first: int
    size: int
    parallelism: int
    after: int | None


def split(points: int, largest: int | None, parallelism: int) -> list[Part]:
    """Split points into arrays of at most `largest`, of which `parallelism` points run at a time.

    The arrays share this number. Where there are more arrays than that, each of the others waits
    for the end of an earlier one.
    """
    size = points if largest is None else min(points, largest)
    n = -(-points // size)
    lanes = min(n, parallelism)
    return [
        Part(
            first=i * size,
            size=min(size, points - i * size),
            parallelism=parallelism // lanes + (i % lanes < parallelism % lanes),
            after=i - lanes if i >= lanes else None,
        )
        for i in range(n)
    ]
