"""What the routers of this package share: a linear gate in float32, and how experts are balanced.

Shapes: B sequences, L positions, D model width, E experts, k experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunaris.model.roles import Role
from lunaris.moe.balance import balance_loss, global_balance_loss
from lunaris.moe.router.base import Router, RoutingSpec


class TopKRouter(Router):
    """Base of a router that scores the experts by a linear gate and takes the k best.

    `moe.balancing` decides what evens out the experts' loads. `aux_loss`: Switch's loss (arXiv
    2101.03961, eq. 4 to 6) times its weight, over the global batch or each sequence
    (`moe.balance_scope`). `bias`: a bias that is added to the scores for the choice alone (arXiv
    2408.15664) and moved once an optimizer step. `none`: nothing.

    Buffers, float32, saved with the weights: balance_bias [E], zero unless balancing is `bias`;
    load_shares [E], only with aux_loss over the global batch: each expert's share of the
    assignments of the step before, uniform before the first.
    """

    balance_bias: Tensor
    load_shares: Tensor

    def __init__(self, d_model: int, spec: RoutingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))
        self.register_buffer("balance_bias", torch.zeros(spec.n_experts, dtype=torch.float32))
        self.aux_loss_weight = spec.aux_loss_weight if spec.balancing == "aux_loss" else 0.0
        self.remembers_load = spec.balancing == "aux_loss" and spec.balance_scope == "global"
        if self.remembers_load:
            self.register_buffer("load_shares", torch.empty(spec.n_experts, dtype=torch.float32))
            self.load_shares.fill_(1 / spec.n_experts)

    def logits(self, x: Tensor) -> Tensor:
        """Return the gate's outputs ([B, L, E] float32) for x ([B, L, D]); autocast must be off."""
        return F.linear(x.float(), self.weight.float())

    def choice_scores(self, scores: Tensor) -> Tensor:
        """Return what the choice compares: the scores ([B, L, E]) and the bias, no gradient."""
        biased = scores + self.balance_bias if self.spec.balancing == "bias" else scores
        return biased.detach()

    def routing_loss(self, logits: Tensor, probs: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted router z-loss (arXiv 2202.08906, eq. 5) and balance loss ([]).

        logits, probs: [B, L, E], each token's probabilities summing to 1; counts: [B, E]
        assignments.
        """
        loss = self.spec.router_z_loss_weight * logits.logsumexp(dim=-1).square().mean()
        if self.aux_loss_weight:
            balance = (
                global_balance_loss(probs, self.load_shares)
                if self.remembers_load
                else balance_loss(probs, counts)
            )
            loss = loss + self.aux_loss_weight * balance
        return loss

    @torch.no_grad()
    def update_balance(self, load: Tensor) -> None:
        """Move the bias, or remember the shares, by the load of a step ([E]).

        b_i ← b_i + rate · sign(mean load − load_i) (arXiv 2408.15664, algorithm 1).
        """
        if self.spec.balancing == "bias":
            direction = torch.sign(load.mean() - load).to(self.balance_bias)
            self.balance_bias.add_(direction, alpha=self.spec.bias_update_rate)
        if self.remembers_load:
            self.load_shares.copy_(load / load.sum())

    def routing_numbers(self) -> dict[str, Tensor]:
        """Return how far apart the balance biases are, where the router has them."""
        if self.spec.balancing != "bias":
            return {}
        return {"bias_range": self.balance_bias.max() - self.balance_bias.min()}

    def parameter_roles(self) -> dict[str, Role]:
        return {"weight": Role.ROUTER}

    def reset_buffers(self) -> None:
        """Set the bias to zeros and the shares to uniform ones."""
        self.balance_bias.zero_()
        if self.remembers_load:
            self.load_shares.fill_(1 / self.spec.n_experts)
