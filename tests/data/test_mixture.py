"""Mixtures: proportions, exactness, and a validation part a source."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lunaris.data.loader import Loader
from lunaris.data.mixture import MixedSequences, slots
from lunaris.data.shards import ShardsData
from lunaris.errors import UserError


def make_sources(tmp_path: Path, sizes: dict[str, int]) -> list[str]:
    """Write one folder a source; source i holds the ids i · 10,000 + 0, 1, 2, …"""
    for i, (name, size) in enumerate(sizes.items()):
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / "0.npy", (i * 10_000 + np.arange(size)).astype(np.uint32))
    return [str(tmp_path / name) for name in sizes]


def mixture(tmp_path: Path, weights: list[float] | None, seed: int = 3) -> MixedSequences:
    data = ShardsData(
        dir=make_sources(tmp_path, {"code": 801, "prose": 401, "math": 201}),
        weights=weights,
        val_fraction=0,
    )
    data.ensure_ready()
    part = data.train(seq_len=4, seed=seed)
    assert isinstance(part, MixedSequences)
    return part


def gathered(part: MixedSequences, n: np.ndarray) -> np.ndarray:
    out = np.empty((len(n), 5), dtype=np.int64)
    part.gather(n, out)
    return out


def test_proportions_over_ten_thousand_sequences(tmp_path: Path) -> None:
    weights = [0.6, 0.3, 0.1]
    part = mixture(tmp_path, weights)
    count = 10_000
    rows = gathered(part, np.arange(count))
    source = rows[:, 0] // 10_000
    assert np.array_equal(source, part.source(np.arange(count)))
    for i, weight in enumerate(weights):
        error = math.sqrt(weight * (1 - weight) / count)
        assert abs((source == i).mean() - weight) < 4 * error


def test_without_weights_by_size(tmp_path: Path) -> None:
    share = np.bincount(mixture(tmp_path, None).source(np.arange(10_000))) / 10_000
    assert np.allclose(share, [200 / 350, 100 / 350, 50 / 350], atol=0.02)


def test_same_sequence_whoever_asks(tmp_path: Path) -> None:
    part = mixture(tmp_path, [5, 3, 2])
    n = np.arange(2000)
    together = gathered(part, n)
    scattered = np.random.default_rng(0).permutation(n)
    assert np.array_equal(gathered(part, scattered), together[scattered])
    assert np.array_equal(gathered(part, n[500:777]), together[500:777])


def test_the_order_of_the_sources_follows_from_the_seed(tmp_path: Path) -> None:
    n = np.arange(1000)
    one, two = (mixture(tmp_path, [5, 3, 2], seed).source(n) for seed in (3, 4))
    assert np.array_equal(one, mixture(tmp_path, [5, 3, 2], seed=3).source(n))
    # By chance alone, two orders agree at 0.5² + 0.3² + 0.2² of the places.
    assert (one == two).mean() < 0.5
    # A run that is resumed depends on this order for ever.
    assert one[:20].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 2, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]


def test_each_source_goes_through_its_own_epochs(tmp_path: Path) -> None:
    part = mixture(tmp_path, [1, 1, 2])
    # A whole block: every source gets exactly its slots.
    n = np.arange(2**20)
    source, number = part._locate(n)
    assert np.bincount(source).tolist() == [2**18, 2**18, 2**19]
    for i in range(3):
        assert np.array_equal(np.sort(number[source == i]), np.arange((source == i).sum()))
    next_source, next_number = part._locate(n[:1000] + 2**20)
    assert (next_number >= np.array([2**18, 2**18, 2**19])[next_source]).all()


@pytest.mark.parametrize("weights", [[1.0], [1e-9, 1.0], [1, 1, 1], [0.1] * 10, [3, 2, 1e-6]])
def test_slots_are_true_to_half_a_slot(weights: list[float]) -> None:
    exact = np.array(weights) / sum(weights) * 2**20
    counts = slots(np.array(weights))
    assert counts.sum() == 2**20
    assert (counts >= 1).all()
    assert (np.abs(counts - exact) <= 1).all()


def test_same_order_after_resume_and_at_another_world_size(tmp_path: Path) -> None:
    part = mixture(tmp_path, [5, 3, 2])

    def steps(count: int, start: int, world_size: int) -> list[list[list[int]]]:
        """Return the sorted rows of each step's global batch of 12."""
        loaders = [
            Loader(part, batch_size=12 // world_size, rank=r, world_size=world_size, start=start)
            for r in range(world_size)
        ]
        try:
            batches = [[next(iter(loader))["tokens"] for loader in loaders] for _ in range(count)]
        finally:
            for loader in loaders:
                loader.close()
        return [sorted(row for t in step for row in t.flatten(0, 1).tolist()) for step in batches]

    whole = steps(30, start=0, world_size=1)
    assert steps(18, start=12 * 12, world_size=1) == whole[12:]
    assert steps(18, start=12 * 12, world_size=4) == whole[12:]


def test_validation_of_every_source(tmp_path: Path) -> None:
    dirs = make_sources(tmp_path, {"code": 800, "prose": 400})
    data = ShardsData(dir=dirs, weights=[0.9, 0.1], val_fraction=0.25)
    data.ensure_ready()
    parts = data.val(9)
    assert {name: len(part) for name, part in parts.items()} == {"code": 22, "prose": 11}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_make_no_sense(tmp_path: Path, weights: list[float]) -> None:
    dirs = make_sources(tmp_path, {"code": 80, "prose": 40})
    with pytest.raises(UserError, match=r"data\.weights"):
        ShardsData(dir=dirs, weights=weights).ensure_ready()
