"""Synthetic tokens: seeded, within the vocabulary, and learnable."""

from __future__ import annotations

import numpy as np
import pytest

from lunaris.data.synthetic import SyntheticData, bigram_tokens
from lunaris.errors import UserError


def test_tokens_follow_from_the_seed() -> None:
    assert np.array_equal(bigram_tokens(50, 2000, 1), bigram_tokens(50, 2000, 1))
    assert not np.array_equal(bigram_tokens(50, 2000, 1), bigram_tokens(50, 2000, 2))


def test_most_tokens_have_few_followers() -> None:
    tokens = bigram_tokens(64, 50_000, 0)
    assert tokens.max() < 64
    counts = np.zeros((64, 64))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    top = np.sort(counts, axis=1)[:, -4:].sum() / counts.sum()
    assert 0.88 < top < 0.95


def test_train_and_val_are_apart() -> None:
    data = SyntheticData(vocab_size=32, n_tokens=4001)
    data.ensure_ready()
    train, val = data.train(16, seed=0), data.val(16)["synthetic"]
    assert (len(train), len(val)) == (250, 31)
    row = np.empty((1, 17), dtype=np.int64)
    val.gather(np.array([0]), row)
    assert np.array_equal(row[0], bigram_tokens(32, 4501, 0)[4001:4018])


def test_too_few_tokens() -> None:
    data = SyntheticData(n_tokens=16)
    data.ensure_ready()
    with pytest.raises(UserError, match="16 training tokens"):
        data.train(16, seed=0)
