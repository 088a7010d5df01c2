"""Sigmoid gating with group-limited choice, as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Shapes: B sequences, L positions, D model width, E experts, G groups, k experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lunaris.model.layers import ModelShape
from lunaris.moe.balance import balance_loss, sequence_counts
from lunaris.moe.router.base import Router, Routing, RoutingSpec
from lunaris.moe.router.top_k import TopKRouter

# Added to the sum by which gates are divided, as in the exported classes of Hugging Face.
_EPSILON = 1e-20


class SigmoidRouterFactory:
    """The same sigmoid router in every layer; keys as in the `moe/router` option."""

    def __init__(
        self,
        *,
        route_scale: float = 1.0,
        n_groups: int = 1,
        topk_groups: int = 1,
        sequence_loss_weight: float = 1e-4,
    ) -> None:
        self._keys = (route_scale, n_groups, topk_groups, sequence_loss_weight)

    def __call__(self, layer: int, shape: ModelShape, spec: RoutingSpec) -> Router:
        return SigmoidRouter(shape.d_model, spec, *self._keys)


class SigmoidRouter(TopKRouter):
    """Scores each expert by itself: s = sigmoid(logit), in float32.

    The balance bias is added to the scores for the choice alone. A gate is the raw score; with
    `normalize_gates` it is divided by the sum of the chosen scores + 1e-20; then it is multiplied
    by route_scale. Where losses ask for probabilities, they are s / Σ s.
    """

    def __init__(
        self,
        d_model: int,
        spec: RoutingSpec,
        route_scale: float,
        n_groups: int,
        topk_groups: int,
        sequence_loss_weight: float,
    ) -> None:
        super().__init__(d_model, spec)
        self.route_scale = route_scale
        self.n_groups = n_groups
        self.topk_groups = topk_groups
        self.sequence_loss_weight = sequence_loss_weight

    def forward(self, x: Tensor) -> Routing:
        """Route x ([B, L, D]); in float32, also under autocast."""
        spec = self.spec
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x)
            scores = logits.sigmoid()
            experts = self._choose(self.choice_scores(scores))
            gates = scores.gather(-1, experts)
            if spec.normalize_gates:
                gates = gates / (gates.sum(dim=-1, keepdim=True) + _EPSILON)
            gates = gates * self.route_scale
            counts = sequence_counts(experts, spec.n_experts)
            probs = scores / (scores.sum(dim=-1, keepdim=True) + _EPSILON)
            loss = self.routing_loss(logits, probs, counts)
            if self.sequence_loss_weight:
                loss = loss + self.sequence_loss_weight * self._sequence_loss(scores, probs)
        return Routing(experts, gates, loss, counts.sum(dim=0))

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the k best experts ([B, L, k] int64) of the best groups; scores: [B, L, E].

        Group g holds the E/G experts from g · E/G on. Its score is the sum of its two best ones.
        """
        k = self.spec.n_experts_per_token
        if self.topk_groups < self.n_groups:
            grouped = scores.unflatten(-1, (self.n_groups, -1))  # [B, L, G, E/G]
            best_two = grouped.topk(min(2, grouped.size(-1)), dim=-1).values.sum(dim=-1)
            groups = best_two.topk(self.topk_groups, dim=-1).indices
            closed = torch.ones_like(best_two, dtype=torch.bool).scatter(-1, groups, False)
            scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return scores.topk(k, dim=-1).indices

    def _sequence_loss(self, scores: Tensor, probs: Tensor) -> Tensor:
        """Return the sequence-wise balance loss [] without its weight (eq. 17 to 20).

        Its fᵢ counts the k largest raw scores, without bias and groups (eq. 18).
        """
        best = scores.detach().topk(self.spec.n_experts_per_token, dim=-1).indices
        return balance_loss(probs, sequence_counts(best, self.spec.n_experts))
