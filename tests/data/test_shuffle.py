"""The order of sequences is a permutation, another one each epoch, and always the same one."""

from __future__ import annotations

import numpy as np
import pytest

from lunaris.data.shuffle import permute

GOLDEN = [6, 7, 2, 1, 8, 0, 9, 4, 5, 3]
GOLDEN_HUGE = [600706295190373, 1187971375450452, 1188548488932092]


def order(size: int, seed: int, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed, np.full(size, epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 16, 17, 255, 256, 257, 1000, 65_537])
def test_every_place_comes_once(size: int) -> None:
    assert np.array_equal(np.sort(order(size, seed=3)), np.arange(size))


def test_seed_and_epoch_change_the_order() -> None:
    first = order(1000, seed=1)
    assert not np.array_equal(first, np.arange(1000))
    for other in (order(1000, seed=2), order(1000, seed=1, epoch=1)):
        # Two unrelated permutations agree in one place on average.
        assert (first == other).sum() < 10


def test_one_at_a_time_equals_all_at_once() -> None:
    size = 777
    index = np.arange(2 * size) % size
    epoch = np.arange(2 * size) // size
    single = [permute(index[i : i + 1], size, 5, epoch[i : i + 1])[0] for i in range(2 * size)]
    assert permute(index, size, 5, epoch).tolist() == single


def test_order_is_kept_for_ever() -> None:
    """A run that is resumed by a later version must go on in the order it began with."""
    assert order(10, seed=1337).tolist() == GOLDEN
    huge = permute(np.array([0, 1, 10**15]), 3 * 10**15, 1337, np.array([0, 1, 10**6]))
    assert huge.tolist() == GOLDEN_HUGE


def test_neighbours_are_scattered() -> None:
    places = order(100_000, seed=7)
    steps = np.abs(np.diff(places))
    # For a random permutation the mean distance is a third of the size.
    assert 0.32 * 100_000 < steps.mean() < 0.347 * 100_000
