"""Softmax gating.

Shapes: B sequences, L positions, D model width, E experts, k experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunaris.model.layers import ModelShape
from lunaris.model.roles import Role
from lunaris.moe.balance import balance_loss, sequence_counts
from lunaris.moe.router.base import Router, Routing, RoutingSpec


class SoftmaxRouterFactory:
    """The same softmax router in every layer."""

    def __call__(self, layer: int, shape: ModelShape, spec: RoutingSpec) -> Router:
        """Return the router of layer `layer`."""
        return SoftmaxRouter(shape.d_model, spec)


class SoftmaxRouter(Router):
    """Softmax top-k gating in float32.

    Balancing: `aux_loss` adds Switch's loss (arXiv 2101.03961, eq. 4 to 6) times its weight;
    `bias` adds a bias to the probabilities for the choice alone (arXiv 2408.15664), moved once an
    optimizer step by `update_balance`; `none` does nothing. All add the z-loss (arXiv 2202.08906,
    eq. 5) times its weight.

    Switch's loss is computed for each sequence and then averaged, so it does not depend on how a
    global batch is split into micro-steps and processes; a product of batch means would.
    """

    balance_bias: Tensor

    def __init__(self, d_model: int, spec: RoutingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))
        self.register_buffer("balance_bias", torch.zeros(spec.n_experts, dtype=torch.float32))
        self.aux_loss_weight = spec.aux_loss_weight if spec.balancing == "aux_loss" else 0.0

    def forward(self, x: Tensor) -> Routing:
        """Route x ([B, L, D]); in float32, also under autocast."""
        spec = self.spec
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            probs = logits.softmax(dim=-1)
            scores = probs + self.balance_bias if spec.balancing == "bias" else probs
            experts = scores.detach().topk(spec.n_experts_per_token, dim=-1).indices
            gates = probs.gather(-1, experts)
            if spec.normalize_gates:
                gates = gates / gates.sum(dim=-1, keepdim=True)
            counts = sequence_counts(experts, spec.n_experts)
            loss = spec.router_z_loss_weight * logits.logsumexp(dim=-1).square().mean()
            if self.aux_loss_weight:
                loss = loss + self.aux_loss_weight * balance_loss(probs, counts)
        return Routing(experts, gates, loss, counts.sum(dim=0))

    @torch.no_grad()
    def update_balance(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean load ([E], of the step), lower the others.

        b_i ← b_i + rate · sign(mean load − load_i) (arXiv 2408.15664, algorithm 1).
        """
        if self.spec.balancing == "bias":
            direction = torch.sign(load.mean() - load).to(self.balance_bias)
            self.balance_bias.add_(direction, alpha=self.spec.bias_update_rate)

    def parameter_roles(self) -> dict[str, Role]:
        """Return the role of the gate's weights."""
        return {"weight": Role.ROUTER}

    def reset_buffers(self) -> None:
        """Set the bias to its initial zeros."""
        self.balance_bias.zero_()
