"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimizer.

Muon: https://kellerjordan.github.io/posts/muon/; the update scale that lets it share AdamW's
learning rate and weight decay is that of arXiv 2502.16982, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lunaris.optim.groups import group_by_role

# The quintic polynomial that moves all singular values in (0, 1] towards 1 (Muon's post).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Return the nearest semi-orthogonal matrices, approximately, by Newton-Schulz iteration.

    matrices: [..., rows, columns], any float dtype; computed in bfloat16 on CUDA and in float32
    elsewhere; returned in float32. The leading dimensions are a batch (stacked experts).
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised per matrix; groups with `adamw=True` step by AdamW instead.

    The update of a [rows, columns] matrix is scaled by 0.2 · sqrt(max(rows, columns)), which
    gives it the root mean square of an AdamW update. A sharded (DTensor) momentum is gathered for
    the iteration and its result sharded again, so the numbers do not depend on the sharding.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._adamw if group["adamw"] else self._muon
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, group)
        return loss

    def _muon(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        grad, momentum = parameter.grad, state["momentum"]
        assert grad is not None
        momentum.lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(momentum, group["momentum"])
        full = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
        update = orthogonalize(full, group["ns_steps"])
        scale = 0.2 * max(full.shape[-2:]) ** 0.5
        if isinstance(nesterov, DTensor):
            # All processes have the same full update, so each takes its shard without an exchange.
            update = distribute_tensor(
                update, nesterov.device_mesh, nesterov.placements, src_data_rank=None
            )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        grad, mean, square = parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        step = state["step"].item()
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))


def build_muon(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: Sequence[float],
    eps: float,
    momentum: float,
    ns_steps: int,
    router_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """Return Muon over the matrices and stacked experts of `model`, AdamW over the rest.

    Matrices, embeddings and routers decay; norms do not. Routers learn at `router_lr_scale` times
    the rate. A group's `peak_lr` is its rate before the schedule.
    """
    found = group_by_role(model)
    rows = [
        (found.matrices, False, weight_decay, learning_rate),
        (found.embeddings, True, weight_decay, learning_rate),
        (found.norms, True, 0.0, learning_rate),
        (found.routers, True, weight_decay, learning_rate * router_lr_scale),
    ]
    groups = [
        {"params": params, "adamw": adamw, "weight_decay": decay, "lr": rate, "peak_lr": rate}
        for params, adamw, decay, rate in rows
        if params
    ]
    return Muon(groups, betas=tuple(betas), eps=eps, momentum=momentum, ns_steps=ns_steps)
