"""AdamW with weight-decay groups and a router group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lunaris.optim.groups import by_layout, group_by_role


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: Sequence[float],
    eps: float,
    router_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101) over the parameters of `model`.

    Matrices, embeddings, stacked experts and routers decay; norms do not. Routers learn at
    `router_lr_scale` times the rate. A group's `peak_lr` is its rate before the schedule.
    """
    found = group_by_role(model)
    rows = [
        (found.matrices + found.embeddings, weight_decay, learning_rate),
        (found.norms, 0.0, learning_rate),
        (found.routers, weight_decay, learning_rate * router_lr_scale),
    ]
    groups = [
        {"params": params, "weight_decay": decay, "lr": rate, "peak_lr": rate}
        for members, decay, rate in rows
        for params in by_layout(members)
    ]
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=True)
