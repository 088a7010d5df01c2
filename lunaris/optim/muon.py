"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimizer.

Muon: https://kellerjordan.github.io/posts/muon/; the update scale that lets it share AdamW's
learning rate and weight decay is that of arXiv 2502.16982, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lunaris.optim.groups import parameter_groups

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

    Where `found_inf` ([] float32 on the device, as torch's gradient scaler sets it) is 1, a step
    changes no bit of weights and state, without waiting for the device.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient; closures are not supported."""
        for group in self.param_groups:
            update = self._adamw if group["adamw"] else self._muon
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, group, self._skip(parameter))

    def _skip(self, parameter: nn.Parameter) -> Tensor:
        """Return whether the step is skipped ([] bool), on the device of `parameter`."""
        if self.found_inf is None:
            return torch.zeros((), dtype=torch.bool, device=parameter.device)
        return self.found_inf.to(parameter.device, non_blocking=True).bool()

    def _muon(self, parameter: nn.Parameter, group: dict[str, Any], skip: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        assert parameter.grad is not None
        # Its own momentum as the gradient leaves the momentum as it is.
        grad = torch.where(skip, momentum, parameter.grad)
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
        parameter.mul_(torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"]))
        # A negative factor makes it -0.0, which changes no bit of what it is added to.
        parameter.add_(torch.where(skip, 0.0, update), alpha=-group["lr"] * scale)

    def _adamw(self, parameter: nn.Parameter, group: dict[str, Any], skip: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            device = parameter.device
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        grad, mean, square = parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        assert grad is not None
        state["step"] += ~skip
        # At least 1: the first step of all may be skipped.
        step = state["step"].clamp(min=1).double()
        mean.lerp_(torch.where(skip, mean, grad), 1 - beta1)
        grad = torch.where(skip, 0.0, grad)
        square.mul_(torch.where(skip, 1.0, beta2)).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"]))
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (mean * (-group["lr"] / (1 - beta1**step))).div_(denominator)
        parameter.add_(torch.where(skip, -0.0, update))


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

    Its groups are those of `parameter_groups`.
    """
    found = parameter_groups(model, learning_rate, weight_decay, router_lr_scale)
    groups = [
        group | {"adamw": name != "matrices"} for name, group in found.items() if group["params"]
    ]
    defaults = {"betas": tuple(betas), "eps": eps, "momentum": momentum, "ns_steps": ns_steps}
    return Muon(groups, defaults)
