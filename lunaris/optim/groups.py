"""The parameter groups of an optimizer: which weights decay, and at which rate they learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lunaris.model.roles import Role, parameters_in


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    router_lr_scale: float,
    width_multiplier: float = 1.0,
    *,
    orthogonal: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return an optimizer's groups of the trainable parameters, each parameter once.

    `matrices` (of the blocks, stacked experts among them), `embeddings` (and an untied head) and
    `routers` decay, `norms` (and biases) do not. Routers learn at `router_lr_scale` times the rate.
    `peak_lr` is a group's rate before the schedule. Raises UserError for a parameter without role.

    width_multiplier: `WidthFactors.width`. The rates of matrices and routers are divided by it, as
    Adam's updates need (arXiv 2203.03466, table 8). orthogonal: the updates of matrices have equal
    singular values and, at any width, the same root mean square: their rate is divided by its root
    instead (the spectral condition of arXiv 2310.17813). The decay of these groups is multiplied by
    as much, so that a step shrinks weights by the same share at any width (arXiv 2510.19093).
    """
    inner = width_multiplier**0.5 if orthogonal else width_multiplier
    groups = {}
    for name, role, base_decay, base_rate, divisor in (
        ("matrices", Role.MATRIX | Role.EXPERT, weight_decay, learning_rate, inner),
        ("embeddings", Role.EMBEDDING, weight_decay, learning_rate, 1.0),
        ("norms", Role.NORM | Role.BIAS, 0.0, learning_rate, 1.0),
        ("routers", Role.ROUTER, weight_decay, learning_rate * router_lr_scale, width_multiplier),
    ):
        rate, decay = base_rate / divisor, base_decay * divisor
        params = [p for p in parameters_in(model, role) if p.requires_grad]
        groups[name] = {"params": params, "weight_decay": decay, "lr": rate, "peak_lr": rate}
    return groups


def by_layout(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters into those that one fused step can take: plain, or sharded on one mesh."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what the config says of each group of an optimizer: all but its parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def restore_settings(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Set the groups back to `settings`: a checkpoint has those of the config it was saved with."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def set_learning_rate(groups: list[dict[str, object]], multiplier: float) -> None:
    """Set each group's `lr` to its `peak_lr` times the schedule's multiplier.

    The peak rate of the routers' group includes `moe.router_lr_scale`, so every step keeps it.
    """
    for group in groups:
        group["lr"] = group["peak_lr"] * multiplier  # type: ignore[operator]
