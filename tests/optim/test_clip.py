"""Gradient norm and clipping over plain and sharded gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lunaris.distributed import session
from lunaris.optim.clip import clip_grad_norm


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Yield a 1 × 1 mesh of this process; what several processes do is in test_spread."""
    with session.join("cpu", 60.0):
        session.ensure_group()
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard"))


def parameters(*shapes: tuple[int, ...], scale: float = 1.0) -> list[nn.Parameter]:
    """Return parameters with seeded gradients."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
def test_agrees_with_torch(max_norm: float | None) -> None:
    ours, theirs = parameters((3, 4), (5,)), parameters((3, 4), (5,))
    norm = clip_grad_norm(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, float("inf") if max_norm is None else max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_below_the_limit_no_bit_changes() -> None:
    mine = parameters((4, 3), (5,))
    before = [p.grad.clone() for p in mine]
    versions = [p.grad._version for p in mine]
    assert clip_grad_norm(mine, 1e3) < 1e3
    assert all(torch.equal(p.grad, grad) for p, grad in zip(mine, before, strict=True))
    # A CPU is spared the pass over all gradients.
    assert [p.grad._version for p in mine] == versions


def test_plain_and_sharded_together(mesh: DeviceMesh) -> None:
    """One model has several meshes and placements: those of experts and those of the rest."""
    plain, expected = parameters((3, 4), (5,), (2, 6)), parameters((3, 4), (5,), (2, 6))
    total = nn.utils.clip_grad_norm_(expected, 0.5)
    sharded = [plain[0]]
    for parameter, at, placements in (
        (plain[1], mesh["shard"], [Shard(0)]),
        (plain[2], mesh, [Replicate(), Shard(1)]),
    ):
        local = nn.Parameter(DTensor.from_local(parameter.detach(), at, placements))
        local.grad = DTensor.from_local(parameter.grad, at, placements)
        sharded.append(local)
    norm = clip_grad_norm(sharded, 0.5)
    assert not isinstance(norm, DTensor)
    assert norm.item() == pytest.approx(total.item(), rel=1e-6)
    for a, b in zip(sharded, expected, strict=True):
        grad = a.grad.to_local() if isinstance(a.grad, DTensor) else a.grad
        torch.testing.assert_close(grad, b.grad)


def test_refuses_gradients_that_were_not_reduced(mesh: DeviceMesh) -> None:
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh["shard"], [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(4), mesh["shard"], [Partial()])
    with pytest.raises(AssertionError, match="not reduced"):
        clip_grad_norm([parameter], 1.0)


def test_norm_that_is_not_finite_is_returned() -> None:
    ours = parameters((3,))
    ours[0].grad[0] = float("inf")
    assert clip_grad_norm(ours, 1.0).isinf()


def test_no_gradients() -> None:
    assert clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0).item() == 0
