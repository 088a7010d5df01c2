"""Softmax gating.

Shapes: B sequences, L positions, D model width, E experts, k experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lunaris.model.layers import ModelShape
from lunaris.moe.balance import sequence_counts
from lunaris.moe.router.base import Router, Routing, RoutingSpec
from lunaris.moe.router.top_k import TopKRouter

# The least divisor of `normalize_gates`. Chosen probabilities sum to less only where a bias chooses
# experts whose probabilities underflow; their gates are then zeros instead of NaN.
_LEAST_SUM = 1e-20


class SoftmaxRouterFactory:
    """The same softmax router in every layer."""

    def __call__(self, layer: int, shape: ModelShape, spec: RoutingSpec) -> Router:
        return SoftmaxRouter(shape.d_model, spec)


class SoftmaxRouter(TopKRouter):
    """Softmax top-k gating in float32 (arXiv 2101.03961): a gate is its expert's probability."""

    def forward(self, x: Tensor) -> Routing:
        """Route x ([B, L, D]); in float32, also under autocast."""
        spec = self.spec
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x)
            probs = logits.softmax(dim=-1)
            experts = self.choice_scores(probs).topk(spec.n_experts_per_token, dim=-1).indices
            gates = probs.gather(-1, experts)
            if spec.normalize_gates:
                gates = gates / gates.sum(dim=-1, keepdim=True).clamp_min(_LEAST_SUM)
            counts = sequence_counts(experts, spec.n_experts)
            loss = self.routing_loss(logits, probs, counts)
        return Routing(experts, gates, loss, counts.sum(dim=0))
