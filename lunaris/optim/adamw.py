"""AdamW with weight-decay groups and a router group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lunaris.optim.groups import by_layout, parameter_groups


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: Sequence[float],
    eps: float,
    router_lr_scale: float = 1.0,
    width_multiplier: float = 1.0,
) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101) over the parameters of `model`.

    Its groups are those of `parameter_groups`.
    """
    rates = (learning_rate, weight_decay, router_lr_scale, width_multiplier)
    found = parameter_groups(model, *rates)
    groups = [
        group | {"params": params}
        for group in found.values()
        for params in by_layout(group["params"])
    ]
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=True)
