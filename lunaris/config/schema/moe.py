"""The schemas of the feed-forward: dense or a Mixture of Experts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lunaris.config.schema.base import Component, changeable, component, key
from lunaris.config.schema.model import ModelConfig
from lunaris.config.widths import GATED, expert_width
from lunaris.errors import UserError


@dataclass
class FeedForwardConfig(Component):
    """What builds the feed-forward of each layer."""

    _group_ = "moe"


@dataclass
class RouterConfig(Component):
    """What chooses the experts of a token."""

    _group_ = "moe.router"


@dataclass
class SoftmaxRouterConfig(RouterConfig):
    """Softmax over the experts, then the k largest (arXiv 2101.03961)."""

    _target_: str = "lunaris.moe.router.softmax.SoftmaxRouterFactory"


@dataclass
class SigmoidRouterConfig(RouterConfig):
    """A sigmoid of each expert's logit, then the k largest (arXiv 2412.19437)."""

    _target_: str = "lunaris.moe.router.sigmoid.SigmoidRouterFactory"
    # The factor of all gates, after moe.normalize_gates.
    route_scale: float = key(1.0, above=0)
    # Groups of neighbouring experts.
    n_groups: int = key(1, low=1)
    # A token takes experts of so many groups, the best ones.
    topk_groups: int = key(1, low=1)
    # Of the sequence-wise balance loss, which is added whatever moe.balancing is.
    sequence_loss_weight: float = changeable(1e-4, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_groups > self.n_groups:
            raise UserError(
                f"moe.router.topk_groups={self.topk_groups}: "
                f"must be at most moe.router.n_groups={self.n_groups}"
            )


@dataclass
class NoMoEConfig(FeedForwardConfig):
    """A dense model: every layer has one feed-forward."""

    _target_: str = "lunaris.moe.factory.DenseFactory"


@dataclass
class MoEConfig(FeedForwardConfig):
    """A Mixture-of-Experts feed-forward in every layer from `first_dense_layers` on."""

    _target_: str = "lunaris.moe.factory.MoEFactory"
    # Routed experts of a layer.
    n_experts: int = key(8, low=1, at_most=2**16)
    # Experts that each token takes, k.
    n_experts_per_token: int = key(1, low=1)
    # Experts that every token takes besides.
    n_shared_experts: int = key(0, low=0, at_most=2**16)
    # Tokens an expert takes of L tokens: ceil(factor · L · k / n_experts); null: dropless.
    capacity_factor: float | None = key(None, above=0)
    # Whose tokens share that: a document's (without data.document_masking, a sequence's), or a
    # sequence's.
    capacity_scope: str = key("document", allowed=("document", "sequence"))
    # How experts are kept equally busy: a loss, a bias on the choice (arXiv 2408.15664), or not.
    balancing: str = key("aux_loss", allowed=("aux_loss", "bias", "none"))
    # Of aux_loss: whether shares are counted over the global batch (of the step before) or in each
    # sequence.
    balance_scope: str = key("global", allowed=("global", "sequence"))
    # Of the balance loss (arXiv 2101.03961).
    aux_loss_weight: float = changeable(0.01, low=0)
    # Of the squared log-sum-exp of the router's logits (arXiv 2202.08906).
    router_z_loss_weight: float = changeable(0.001, low=0)
    # Of balancing=bias: change of each bias after a step.
    bias_update_rate: float = changeable(0.001, above=0, at_most=1e6)
    # The router's learning rate, relative to optimizer.learning_rate.
    router_lr_scale: float = changeable(1.0, above=0)
    # Divide the chosen gate probabilities by their sum; needs k > 1.
    normalize_gates: bool = False
    # Of the width of each expert, as model.ffn_hidden_multiplier of a dense feed-forward. Null: the
    # experts of a token, shared ones too, are together as wide as that.
    expert_hidden_multiplier: float | None = key(None, above=0, at_most=2**10)
    # Layers from the first on that have a dense feed-forward.
    first_dense_layers: int = key(0, low=0)
    router: Any = component(RouterConfig, SoftmaxRouterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_experts_per_token > self.n_experts:
            raise UserError(
                f"moe.n_experts_per_token={self.n_experts_per_token}: "
                f"must be at most moe.n_experts={self.n_experts}"
            )
        if isinstance(self.router, SigmoidRouterConfig):
            self._check_groups(self.router)
        if self.normalize_gates and self.n_experts_per_token == 1:
            raise UserError(
                "moe.normalize_gates=true: needs moe.n_experts_per_token above 1; with one expert "
                "the gate is always 1 and the router gets no gradient (moe=switch scales by it)"
            )

    def expert_width(self, model: ModelConfig) -> int:
        """Return the hidden width of one expert in a model."""
        return expert_width(
            GATED[model.activation],
            model.d_model,
            self.expert_hidden_multiplier,
            model.multiple_of,
            dense_multiplier=model.ffn_hidden_multiplier,
            active=self.n_experts_per_token + self.n_shared_experts,
        )

    def _check_groups(self, router: SigmoidRouterConfig) -> None:
        if self.n_experts % router.n_groups:
            raise UserError(
                f"moe.router.n_groups={router.n_groups}: must divide moe.n_experts={self.n_experts}"
            )
        reachable = router.topk_groups * (self.n_experts // router.n_groups)
        if reachable < self.n_experts_per_token:
            raise UserError(
                f"moe.router.topk_groups={router.topk_groups}: such groups hold {reachable} "
                f"experts, fewer than moe.n_experts_per_token={self.n_experts_per_token}"
            )
