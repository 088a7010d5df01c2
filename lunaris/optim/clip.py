"""The gradient norm and clipping, the same for plain and sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Return the norm [] of all gradients and scale them in place down to `max_norm`.

    The norm is the square root of the sum of squares over every element of the whole model.
    Sharded gradients (DTensor) may lie on several meshes: each process sums the squares of its
    own shards, and one all-reduce a mesh adds them up. max_norm: None leaves the gradients alone.
    """
    groups: dict[object, list[Tensor]] = {}
    grads = [p.grad for p in parameters if p.grad is not None]
    for grad in grads:
        key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        groups.setdefault(key, []).append(grad)
    if not grads:
        return torch.zeros(())
    total = torch.stack([_squared_norm(group) for group in groups.values()]).sum()
    norm = total.sqrt().float()
    if max_norm is not None:
        # Not finite: leave the gradients as they are, for the caller to see.
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        torch._foreach_mul_(local, scale)
    return norm


def _squared_norm(grads: list[Tensor]) -> Tensor:
    """Return the sum of squares [] (float64) of gradients that are laid out alike."""
    first = grads[0]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    total = torch.stack(torch._foreach_norm(local)).double().square().sum()
    if isinstance(first, DTensor):
        for dim, placement in enumerate(first.placements):
            if placement.is_shard():
                group = first.device_mesh.get_group(dim)
                torch.distributed.all_reduce(total, group=group)
            else:
                assert placement.is_replicate(), f"gradient is {placement}, not reduced"
    return total
