"""Long lines are thinned without losing a spike or a gap."""

from __future__ import annotations

import pytest

from lunaris.report.curves import thin


def test_short_lines_stay_as_they_are() -> None:
    assert thin([1, 2, 3], [1.0, None, 3.0], 3) == ([1, 2, 3], [1.0, None, 3.0])


@pytest.mark.parametrize("most", [50, 200])
def test_spikes_gaps_and_ends_stay(most: int) -> None:
    steps = list(range(0, 20_000, 2))
    values: list[float | None] = [float(i % 7) for i in range(len(steps))]
    values[4321], values[5678], values[777] = 99.0, -99.0, None
    thinned_steps, thinned = thin(steps, values, most)
    assert len(thinned) <= most
    found = dict(zip(thinned_steps, thinned, strict=True))
    assert (found[2 * 4321], found[2 * 5678], found[2 * 777]) == (99.0, -99.0, None)
    assert thinned_steps[0] == 0 and thinned_steps[-1] == steps[-1]
    assert all(values[step // 2] == value for step, value in found.items())
