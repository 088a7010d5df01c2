"""The contract of a router: what a Mixture-of-Experts layer asks of a module and its factory.

Shapes: B sequences, L positions, D model width, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from lunaris.model.layers import ModelShape


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """The keys of the `moe` group that every router gets; one may ignore what it does not do."""

    n_experts: int
    n_experts_per_token: int
    balancing: str = "aux_loss"
    balance_scope: str = "global"
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    bias_update_rate: float = 0.001
    normalize_gates: bool = False


class Routing(NamedTuple):
    """A router's decision.

    experts: [B, L, k] int64. gates: [B, L, k] float32, the factor of each expert's output; their
    gradient trains the router. loss: [] float32, weighted routing losses, a mean over sequences.
    load: [E] float32, tokens sent to each expert.
    """

    experts: Tensor
    gates: Tensor
    loss: Tensor
    load: Tensor


class Router(nn.Module):
    """Base of every router: chooses k = `n_experts_per_token` different experts for each token.

    It declares its parameters in `parameter_roles` (`lunaris.model.roles`): those with Role.ROUTER
    stay float32 and learn at `moe.router_lr_scale`.
    """

    def forward(self, x: Tensor) -> Routing:
        """Route x ([B, L, D])."""
        raise NotImplementedError

    def update_balance(self, load: Tensor) -> None:
        """Balance the experts, once an optimizer step; a router without such a rule does nothing.

        load: [E] float32, tokens of the step over all micro-steps and processes.
        """

    def routing_numbers(self) -> dict[str, Tensor]:
        """Return what is logged of this router, [] each, as `moe/layer_NN/NAME`."""
        return {}


class RouterFactory(Protocol):
    """Builds the router of each Mixture-of-Experts layer; layers may differ."""

    def __call__(self, layer: int, shape: ModelShape, spec: RoutingSpec) -> Router:
        """Return the router of layer `layer`, counted from 0 over all layers of the model."""
