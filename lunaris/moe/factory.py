"""The feed-forward factories that the `moe` group chooses from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lunaris.config.widths import expert_width
from lunaris.model.activation import ACTIVATIONS
from lunaris.model.layers import FeedForward, ModelShape
from lunaris.moe.experts import Experts
from lunaris.moe.layer import MoE
from lunaris.moe.router.base import RouterFactory, RoutingSpec


class Dense(nn.Module):
    """A dense feed-forward, which has no routing to report."""

    def __init__(self, ffn: FeedForward) -> None:
        super().__init__()
        # Its name in every checkpoint, also where the activation is another.
        self.swiglu = ffn

    def forward(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, None]:
        """Return [B, L, D] for [B, L, D], and None."""
        return self.swiglu(x), None


class DenseFactory:
    """A dense feed-forward in every layer."""

    def __call__(self, layer: int, shape: ModelShape) -> nn.Module:
        activation = ACTIVATIONS[shape.activation]
        hidden = activation.hidden_width(
            shape.d_model, shape.ffn_hidden_multiplier, shape.multiple_of
        )
        return Dense(FeedForward(shape.d_model, hidden, activation, shape.dropout))


class MoEFactory:
    """Experts in every layer from `first_dense_layers` on; keys as in the `moe` group."""

    def __init__(
        self,
        *,
        router: RouterFactory,
        n_shared_experts: int = 0,
        capacity_factor: float | None = None,
        capacity_scope: str = "document",
        router_lr_scale: float = 1.0,
        expert_hidden_multiplier: float | None = None,
        first_dense_layers: int = 0,
        **routing: Any,
    ) -> None:
        """routing: the keys of RoutingSpec."""
        # router_lr_scale belongs to the optimizer, to which `lunaris.run` passes it.
        self._router = router
        self._spec = RoutingSpec(**routing)
        self._n_shared = n_shared_experts
        self._capacity_factor = capacity_factor
        self._capacity_scope = capacity_scope
        self._multiplier = expert_hidden_multiplier
        self._first_dense = first_dense_layers

    def __call__(self, layer: int, shape: ModelShape) -> nn.Module:
        """Return layer `layer`'s feed-forward: dense in the first layers, else experts."""
        if layer < self._first_dense:
            return DenseFactory()(layer, shape)
        activation = ACTIVATIONS[shape.activation]
        hidden = expert_width(
            activation.gated,
            shape.d_model,
            self._multiplier,
            shape.multiple_of,
            dense_multiplier=shape.ffn_hidden_multiplier,
            active=self._spec.n_experts_per_token + self._n_shared,
        )
        shared = None
        if self._n_shared:
            # The shared experts together are one wider feed-forward.
            width = self._n_shared * hidden
            shared = FeedForward(shape.d_model, width, activation, shape.dropout)
        return MoE(
            self._router(layer, shape, self._spec),
            Experts(self._spec.n_experts, shape.d_model, hidden, activation),
            shared,
            self._spec,
            capacity_factor=self._capacity_factor,
            capacity_scope=self._capacity_scope,
            dropout=shape.dropout,
        )
