"""How evenly tokens spread over experts: counts, the balance loss, and capacity.

Shapes: B sequences, L positions, E experts, k experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lunaris.moe.blocks import capacity_of


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


def global_balance_loss(probs: Tensor, shares: Tensor) -> Tensor:
    """Return N · Σ fᵢ · Pᵢ [] with the shares of a global batch (arXiv 2501.11873).

    probs: [B, L, E], whose mean over all tokens is Pᵢ; shares: [E] fᵢ, which sum to 1. The shares
    are those of another batch (the step before), so that the loss is linear in the tokens: its
    mean over parts of a batch, all of one size, is the loss of the batch.
    """
    return shares.numel() * (shares * probs.mean(dim=(0, 1))).sum()


def within_capacity(
    experts: Tensor, n_experts: int, factor: float, documents: Tensor | None = None
) -> Tensor:
    """Return which assignments ([B, L, k] bool) fit their expert's capacity.

    experts: [B, L, k] int64; documents: [B, L] int64, from 0, the document of each position, or
    None where each sequence is one. An expert takes ceil(factor · L · k / E) assignments of each
    document of L positions, in the order of positions (and of choices within a position): a later
    token never displaces an earlier one, and documents do not compete with each other.
    """
    flat = experts.flatten(1)
    size = flat.size(1)
    capacity: int | Tensor = capacity_of(size, n_experts, factor)
    if documents is not None:
        # A document's experts are experts of their own.
        flat = flat + n_experts * documents.repeat_interleave(experts.size(2), dim=1)
    ordered, order = flat.sort(dim=1, stable=True)
    if documents is not None:
        of = ordered // n_experts
        sizes = torch.searchsorted(of, of, right=True) - torch.searchsorted(of, of)
        capacity = (factor * sizes.double() / n_experts).ceil()
    first = torch.searchsorted(ordered, ordered)  # where each assignment's expert begins
    place = torch.arange(size, device=flat.device) - first
    fits = torch.empty_like(flat, dtype=torch.bool).scatter_(1, order, place < capacity)
    return fits.view_as(experts)
