"""How the points of a sweep become arrays that SLURM takes."""

from __future__ import annotations

import pytest

from lunaris.launch.arrays import Part, split


@pytest.mark.parametrize("points", [1, 6, 7, 13, 2500])
@pytest.mark.parametrize("largest", [None, 1, 6, 1001])
@pytest.mark.parametrize("parallelism", [1, 2, 5, 256])
def test_every_point_is_sent_once_and_the_limit_holds(
    points: int, largest: int | None, parallelism: int
) -> None:
    parts = split(points, largest, parallelism)
    assert [i for p in parts for i in range(p.first, p.first + p.size)] == list(range(points))
    assert all(0 < part.size <= (largest or points) for part in parts)
    # At any time at most one array of each chain runs.
    heads = [part for part in parts if part.after is None]
    assert sum(part.parallelism for part in heads) == parallelism
    for part in parts:
        if part.after is not None:
            assert part.parallelism == parts[part.after].parallelism


def test_a_sweep_that_fits_is_one_array() -> None:
    assert split(6, 6, 256) == [Part(0, 6, 256, None)]
