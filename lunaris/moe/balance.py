"""How evenly tokens spread over experts: counts, the balance loss, and capacity.

Shapes: B sequences, L positions, E experts, k experts a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sequence_counts(experts: Tensor, n_experts: int) -> Tensor:
    """Return how many assignments each sequence makes to each expert ([B, E] float32).

    experts: [B, L, k] int64.
    """
    flat = experts.flatten(1)
    counts = torch.zeros(flat.size(0), n_experts, device=flat.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))


def balance_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over sequences of N · Σ fᵢ · Pᵢ [] (arXiv 2101.03961, eq. 4 to 6).

    probs: [B, L, E]; counts: [B, E] assignments. fᵢ is the share of a sequence's assignments to
    expert i, Pᵢ its mean probability; 1 when both are uniform.
    """
    shares = counts / counts.sum(dim=-1, keepdim=True)
    return counts.size(-1) * (shares * probs.mean(dim=1)).sum(dim=-1).mean()


def within_capacity(experts: Tensor, n_experts: int, factor: float) -> Tensor:
    """Return which assignments ([B, L, k] bool) fit their expert's capacity.

    experts: [B, L, k] int64. An expert takes ceil(factor · L · k / E) assignments of each sequence,
    in the order of positions (and of choices within a position): a later token never displaces an
    earlier one, and sequences do not compete with each other.
    """
    flat = experts.flatten(1)
    size = flat.size(1)
    capacity = math.ceil(min(factor * size / n_experts, size))
    ordered, order = flat.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, ordered)  # where each assignment's expert begins
    place = torch.arange(size, device=flat.device) - first
    fits = torch.empty_like(flat, dtype=torch.bool).scatter_(1, order, place < capacity)
    return fits.view_as(experts)
