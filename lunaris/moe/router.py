"""Which experts a token goes to, and what that costs.

Shapes: B sequences, L positions, D model width, E experts, k experts a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunaris.model.roles import Role


class Routing(NamedTuple):
    """What the router decided.

    experts: [B, L, k] int64. gates: [B, L, k] float32, what each expert's output is scaled by.
    loss: [] weighted routing losses. load: [E] float32, tokens sent to each expert.
    """

    experts: Tensor
    gates: Tensor
    loss: Tensor
    load: Tensor


class Router(nn.Module):
    """Softmax top-k gating in float32.

    Balancing: `aux_loss` adds Switch's loss (arXiv 2101.03961, eq. 4 to 6) times its weight;
    `bias` adds a bias to the probabilities for the choice alone (arXiv 2408.15664), moved once an
    optimizer step by `update_balance`; `none` does nothing. All add the z-loss (arXiv 2202.08906,
    eq. 5) times its weight.

    Switch's loss takes each sequence for itself and then the mean: so it does not depend on how a
    global batch is cut into micro-steps and processes, which a product of batch means would.
    """

    balance_bias: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        balancing: str,
        aux_loss_weight: float,
        z_loss_weight: float,
        bias_update_rate: float,
        normalize_gates: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.register_buffer("balance_bias", torch.zeros(n_experts, dtype=torch.float32))
        self.k = k
        self.balancing = balancing
        self.aux_loss_weight = aux_loss_weight if balancing == "aux_loss" else 0.0
        self.z_loss_weight = z_loss_weight
        self.bias_update_rate = bias_update_rate
        self.normalize_gates = normalize_gates

    def forward(self, x: Tensor) -> Routing:
        """Route x ([B, L, D]); float32 whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            probs = logits.softmax(dim=-1)
            scores = probs + self.balance_bias if self.balancing == "bias" else probs
            experts = scores.detach().topk(self.k, dim=-1).indices
            gates = probs.gather(-1, experts)
            if self.normalize_gates:
                gates = gates / gates.sum(dim=-1, keepdim=True)
            counts = self._counts(experts)
            loss = self.z_loss_weight * logits.logsumexp(dim=-1).square().mean()
            if self.aux_loss_weight:
                loss = loss + self.aux_loss_weight * balance_loss(probs, counts)
        return Routing(experts, gates, loss, counts.sum(dim=0))

    def parameter_roles(self) -> dict[str, Role]:
        """Return the role of the gate's weights."""
        return {"weight": Role.ROUTER}

    def reset_buffers(self) -> None:
        """Set the bias to its initial zeros."""
        self.balance_bias.zero_()

    def _counts(self, experts: Tensor) -> Tensor:
        """Return how many assignments each sequence makes to each expert ([B, E] float32)."""
        flat = experts.flatten(1)
        counts = torch.zeros(flat.size(0), len(self.weight), device=flat.device)
        return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))

    @torch.no_grad()
    def update_balance(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean load ([E], of the whole step), lower the others.

        b_i ← b_i + rate · sign(mean load − load_i) (arXiv 2408.15664, algorithm 1).
        """
        if self.balancing == "bias":
            direction = torch.sign(load.mean() - load).to(self.balance_bias)
            self.balance_bias.add_(direction, alpha=self.bias_update_rate)


def balance_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over sequences of N · Σ fᵢ · Pᵢ [] (arXiv 2101.03961, eq. 4 to 6).

    probs: [B, L, E]; counts: [B, E] assignments. fᵢ is the share of a sequence's assignments to
    expert i, Pᵢ its mean probability; 1 when both are uniform.
    """
    shares = counts / counts.sum(dim=-1, keepdim=True)
    return counts.size(-1) * (shares * probs.mean(dim=1)).sum(dim=-1).mean()


def within_capacity(experts: Tensor, n_experts: int, factor: float) -> Tensor:
    """Return which assignments ([B, L, k] bool) fit their expert's capacity.

    An expert takes ceil(factor · L · k / E) assignments of each sequence, in the order of
    positions (and of choices within a position): a later token never displaces an earlier one, and
    another sequence never any.
    """
    flat = experts.flatten(1)
    size = flat.size(1)
    capacity = math.ceil(min(factor * size / n_experts, size))
    ordered, order = flat.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, ordered)  # where each one's expert begins
    place = torch.arange(size, device=flat.device) - first
    fits = torch.empty_like(flat, dtype=torch.bool).scatter_(1, order, place < capacity)
    return fits.view_as(experts)
