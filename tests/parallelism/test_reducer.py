"""Buckets of replicated gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

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


def test_shared_parts_have_buckets_of_their_own_over_their_sharers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    exchange = torch.distributed.all_reduce
    monkeypatch.setattr(
        torch.distributed,
        "all_reduce",
        lambda t, group, **k: sent.append((t.numel(), group)) or exchange(t, group=group, **k),
    )
    mesh = init_device_mesh("cpu", (1,))
    one, idle, other = (
        nn.Parameter(DTensor.from_local(torch.ones(shape), mesh, [Shard(0)], run_check=False))
        for shape in ((2, 3), (4, 1), (2, 2))
    )
    first, last = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
    average = Reducer([first, one, idle, other, last], mesh.get_group())
    average.begin()
    loss = 2 * (other.to_local().sum() + one.to_local().sum() + first.sum() + last.sum())
    loss.backward()
    # The backward reaches `first` last: the bucket of the parts is complete before.
    average.finish()
    assert sent == [(14, mesh.get_group()), (12, None)]
    for parameter, value in ((one, 2.0), (idle, 0.0), (other, 2.0)):
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.placements == parameter.placements
        assert parameter.grad.shape == parameter.shape
        assert (parameter.grad.to_local() == value).all()
    assert first.grad.tolist() == [2.0] * 5


def test_a_bucket_of_one_gradient_needs_no_copy() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    average = Reducer([parameter])
    average.begin()
    (2 * parameter).sum().backward()
    memory = parameter.grad.data_ptr()
    average.finish()
    assert parameter.grad.data_ptr() == memory
    assert parameter.grad.tolist() == [[2.0] * 3] * 2
