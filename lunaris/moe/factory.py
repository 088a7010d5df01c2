"""The feed-forward factories that the `moe` group chooses from."""

from __future__ import annotations

from torch import Tensor, nn

from lunaris.model.layers import ModelShape, SwiGLU, swiglu_hidden
from lunaris.moe.experts import Experts
from lunaris.moe.layer import MoE
from lunaris.moe.router.base import RouterFactory, RoutingSpec


class Dense(nn.Module):
    """A SwiGLU as a feed-forward, which has no routing to report."""

    def __init__(self, d_model: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.swiglu = SwiGLU(d_model, hidden, dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return [B, L, D] for [B, L, D], and None."""
        return self.swiglu(x), None


class DenseFactory:
    """A SwiGLU in every layer."""

    def __call__(self, layer: int, shape: ModelShape) -> nn.Module:
        """Return layer `layer`'s SwiGLU."""
        hidden = swiglu_hidden(shape.d_model, shape.ffn_hidden_multiplier, shape.multiple_of)
        return Dense(shape.d_model, hidden, shape.dropout)


class MoEFactory:
    """Experts in every layer from `first_dense_layers` on; keys as in the `moe` group."""

    def __init__(
        self,
        *,
        router: RouterFactory,
        n_experts: int,
        n_experts_per_token: int,
        n_shared_experts: int = 0,
        capacity_factor: float | None = None,
        balancing: str = "aux_loss",
        aux_loss_weight: float = 0.01,
        router_z_loss_weight: float = 0.001,
        bias_update_rate: float = 0.001,
        router_lr_scale: float = 1.0,
        normalize_gates: bool = False,
        expert_hidden_multiplier: float | None = None,
        first_dense_layers: int = 0,
    ) -> None:
        # router_lr_scale belongs to the optimizer, to which `lunaris.run` passes it.
        self._router = router
        self._spec = RoutingSpec(
            n_experts=n_experts,
            n_experts_per_token=n_experts_per_token,
            balancing=balancing,
            aux_loss_weight=aux_loss_weight,
            router_z_loss_weight=router_z_loss_weight,
            bias_update_rate=bias_update_rate,
            normalize_gates=normalize_gates,
        )
        self._n_shared = n_shared_experts
        self._capacity_factor = capacity_factor
        self._multiplier = expert_hidden_multiplier
        self._first_dense = first_dense_layers

    def __call__(self, layer: int, shape: ModelShape) -> nn.Module:
        """Return layer `layer`'s feed-forward: dense in the first layers, else experts."""
        if layer < self._first_dense:
            return DenseFactory()(layer, shape)
        multiplier = self._multiplier or shape.ffn_hidden_multiplier
        hidden = swiglu_hidden(shape.d_model, multiplier, shape.multiple_of)
        shared = None
        if self._n_shared:
            # The shared experts together are one wider SwiGLU.
            shared = SwiGLU(shape.d_model, self._n_shared * hidden, shape.dropout)
        return MoE(
            self._router(layer, shape, self._spec),
            Experts(self._spec.n_experts, shape.d_model, hidden),
            shared,
            self._spec,
            capacity_factor=self._capacity_factor,
            dropout=shape.dropout,
        )
