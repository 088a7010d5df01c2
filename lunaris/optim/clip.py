"""The gradient norm and clipping, the same for plain and sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lunaris.model.layers import local_part


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Return the norm [] of all gradients and scale them in place down to `max_norm`.

    The norm is the square root of the sum of squares over all elements of all gradients. Sharded
    gradients (DTensor) may lie on several meshes: each process sums the squares of its shards, and
    one all-reduce per mesh dimension adds them up. max_norm: None leaves the gradients unchanged.
    """
    groups: dict[_Layout | None, list[Tensor]] = {}
    grads = [p.grad for p in parameters if p.grad is not None]
    for grad in grads:
        groups.setdefault(_layout(grad), []).append(grad)
    if not grads:
        return torch.zeros(())
    total = torch.stack([_squared_norm(group, at) for at, group in groups.items()]).sum()
    norm = total.sqrt().float()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # Reading the scale of a GPU would wait for it; a CPU is spared a pass over all gradients.
        if norm.is_cuda or scale != 1:
            torch._foreach_mul_([local_part(grad) for grad in grads], scale)
    return norm


class _Layout(NamedTuple):
    """The mesh of a sharded gradient and the mesh's dimensions that hold different elements."""

    mesh: DeviceMesh
    sharded: tuple[int, ...]


def _layout(grad: Tensor) -> _Layout | None:
    if not isinstance(grad, DTensor):
        return None
    for placement in grad.placements:
        assert placement.is_shard() or placement.is_replicate(), f"not reduced: {placement}"
    sharded = (dim for dim, placement in enumerate(grad.placements) if placement.is_shard())
    return _Layout(grad.device_mesh, tuple(sharded))


def _squared_norm(grads: list[Tensor], layout: _Layout | None) -> Tensor:
    """Return the sum of squares [] (float64) of gradients that are laid out alike."""
    norms = torch._foreach_norm([local_part(grad) for grad in grads])
    total = torch.stack(norms).double().square().sum()
    if layout is not None:
        for dim in layout.sharded:
            dist.all_reduce(total, group=layout.mesh.get_group(dim))
    return total
