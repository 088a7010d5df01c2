"""The schemas of the feed-forward: dense or a Mixture of Experts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lunaris.config.schema.base import Component, component
from lunaris.config.schema.checks import above_zero, one_of, within
from lunaris.errors import UserError


@dataclass
class FeedForwardConfig(Component):
    """What builds the feed-forward of each layer."""


@dataclass
class RouterConfig(Component):
    """What chooses the experts of a token."""


@dataclass
class SoftmaxRouterConfig(RouterConfig):
    """Softmax over the experts, then the k largest (arXiv 2101.03961)."""

    _target_: str = "lunaris.moe.router.softmax.SoftmaxRouterFactory"


@dataclass
class NoMoEConfig(FeedForwardConfig):
    """A dense model: every feed-forward is one SwiGLU."""

    _target_: str = "lunaris.moe.factory.DenseFactory"


@dataclass
class MoEConfig(FeedForwardConfig):
    """A Mixture-of-Experts feed-forward in every layer from `first_dense_layers` on."""

    _target_: str = "lunaris.moe.factory.MoEFactory"
    n_experts: int = 8
    n_experts_per_token: int = 1
    n_shared_experts: int = 0
    # Tokens an expert takes of each sequence: ceil(factor · L · k / n_experts); null: dropless.
    capacity_factor: float | None = None
    balancing: str = "aux_loss"
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    bias_update_rate: float = 0.001
    router_lr_scale: float = 1.0
    # Divide the chosen gate probabilities by their sum; needs k > 1.
    normalize_gates: bool = False
    # Null: the model's ffn_hidden_multiplier.
    expert_hidden_multiplier: float | None = None
    first_dense_layers: int = 0
    router: Any = component(RouterConfig, SoftmaxRouterConfig)

    def __post_init__(self) -> None:
        within("moe.n_experts", self.n_experts, low=1)
        within("moe.n_experts_per_token", self.n_experts_per_token, low=1)
        within("moe.n_shared_experts", self.n_shared_experts, low=0)
        within("moe.first_dense_layers", self.first_dense_layers, low=0)
        within("moe.aux_loss_weight", self.aux_loss_weight, low=0)
        within("moe.router_z_loss_weight", self.router_z_loss_weight, low=0)
        above_zero("moe.capacity_factor", self.capacity_factor)
        above_zero("moe.expert_hidden_multiplier", self.expert_hidden_multiplier)
        above_zero("moe.bias_update_rate", self.bias_update_rate)
        above_zero("moe.router_lr_scale", self.router_lr_scale)
        one_of("moe.balancing", self.balancing, ("aux_loss", "bias", "none"))
        if self.n_experts_per_token > self.n_experts:
            raise UserError(
                f"moe.n_experts_per_token={self.n_experts_per_token}: "
                f"must be at most moe.n_experts={self.n_experts}"
            )
        if self.normalize_gates and self.n_experts_per_token == 1:
            raise UserError(
                "moe.normalize_gates=true: needs moe.n_experts_per_token above 1; with one expert "
                "the gate is always 1 and the router gets no gradient"
            )
