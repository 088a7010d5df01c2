"""The order of sequences without ranges."""

from __future__ import annotations

import numpy as np
import pytest

from lunaris.data.order import SequenceOrder


@pytest.mark.parametrize("position", [0, 3, 7, 12, 40])
@pytest.mark.parametrize(
    "ranges", [[], [(5, 9)], [(0, 0), (2, 4), (4, 8), (9, 9), (20, 30)], [(10, 12), (1, 2)]]
)
def test_it_takes_what_is_not_left_out(position: int, ranges: list[tuple[int, int]]) -> None:
    order = SequenceOrder.without(ranges)
    left_out = {n for first, last in ranges for n in range(first, last + 1)}
    expected = [n for n in range(position, 100) if n not in left_out][:25]
    assert order.take(position, np.arange(25)).tolist() == expected
    assert order.first_and_last(position, 25) == (expected[0], expected[-1])


def test_continuing_behind_the_last_taken_equals_not_stopping() -> None:
    order = SequenceOrder.without([(5, 9), (14, 14)])
    whole = order.take(0, np.arange(20)).tolist()
    position, taken = 0, []
    for _ in range(5):
        taken += order.take(position, np.arange(4)).tolist()
        position = taken[-1] + 1
    assert taken == whole
