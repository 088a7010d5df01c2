"""Buckets of replicated gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lunaris.distributed import session
from lunaris.parallelism import reducer
from lunaris.parallelism.reducer import Reducer


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Make a group of this process; sums over several are in test_spread."""
    with session.join("cpu", 60.0):
        session.ensure_group()
        yield


def test_buckets_go_from_the_last_parameter_and_hold_one_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reducer, "_BUCKET_BYTES", 32)
    shapes = [(4,), (2, 2), (100,), (1,), (1,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters[0] = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    buckets = Reducer(parameters)._buckets
    number = {id(p): i for i, p in enumerate(parameters)}
    found = [[number[id(p)] for p in bucket.parameters] for bucket in buckets]
    assert found == [[4, 3], [2], [1], [0]]


def test_gradients_are_exchanged_in_the_asked_backward_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    exchange = torch.distributed.all_reduce
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda t, **k: sent.append(t.numel()) or exchange(t, **k)
    )
    used, idle = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    average = Reducer([used, idle])
    used.sum().backward()
    assert sent == []
    average.begin()
    used.sum().backward()
    average.finish()
    # What got no gradient here may have one elsewhere: it takes part, with zeros.
    assert sent == [10]
    assert used.grad.tolist() == [[2.0] * 3] * 2
    assert idle.grad.tolist() == [0.0] * 4
