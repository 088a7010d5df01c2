"""A Mixture-of-Experts feed-forward.

Shapes: B sequences, L positions, D model width, E experts, k experts a token, T = B·L·k
assignments.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lunaris.model.feed_forward import RoutedFeedForward, RoutingStats
from lunaris.model.layers import FeedForward
from lunaris.moe.balance import within_capacity
from lunaris.moe.blocks import capacity_of
from lunaris.moe.experts import Experts
from lunaris.moe.router.base import Router, RoutingSpec


class MoE(RoutedFeedForward):
    """Routed experts, each output scaled by its gate, plus shared experts that process every token.

    The gate lets the language-model loss reach the router. Capacity drops assignments in
    training only; evaluation and generation never drop any.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: FeedForward | None,
        spec: RoutingSpec,
        *,
        capacity_factor: float | None,
        capacity_scope: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.n_experts = spec.n_experts
        self.k = spec.n_experts_per_token
        self.capacity_factor = capacity_factor
        self.capacity_scope = capacity_scope
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """Return [B, L, D] and the routing statistics for [B, L, D]; documents: [B, L] or None."""
        routing = self.router(x)
        chosen, gates = routing.experts, routing.gates
        dropped = torch.zeros((), device=x.device)
        most = x.size(0) * x.size(1)  # A token chooses an expert once.
        if self.capacity_factor is not None and self.training:
            apart = documents if self.capacity_scope == "document" else None
            fits = within_capacity(chosen, self.n_experts, self.capacity_factor, apart)
            # Expert E does not exist: sorted last, beyond every real expert's rows.
            chosen = chosen.masked_fill(~fits, self.n_experts)
            dropped = (~fits).sum().float()
            if apart is None:
                assignments = x.size(1) * self.k
                most = x.size(0) * capacity_of(assignments, self.n_experts, self.capacity_factor)
        y = self.dropout(self._routed(x, chosen, gates, most)).type_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, RoutingStats(
            routing.loss,
            routing.load.detach(),
            dropped,
            gates.detach().amax(dim=-1).mean(),
            None if self.training else routing.experts,
        )

    def _routed(self, x: Tensor, chosen: Tensor, gates: Tensor, most: int) -> Tensor:
        """Return the gated sum of the chosen experts' outputs ([B, L, D] float32).

        most: assignments that no expert exceeds.
        """
        k = chosen.size(-1)
        flat = chosen.flatten()
        order = flat.sort(stable=True).indices
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        counts = torch.zeros(self.n_experts + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[: self.n_experts]
        out = self.experts(_Dispatch.apply(x.flatten(0, 1), order, inverse, k), counts, most)
        out = _Dispatch.apply(out, inverse, order, 1).unflatten(0, gates.shape)
        # One choice after another: a float32 product of all choices would take k times the memory.
        choices = zip(out.unbind(2), gates.split(1, dim=2), strict=True)
        return reduce(torch.add, [choice * gate for choice, gate in choices])

    def idle_parameters(self) -> int:
        """Return how many parameters of the experts a token does not pass through."""
        total = sum(p.numel() for p in self.experts.parameters())
        return total - total // self.n_experts * self.k

    def update_balance(self, load: Tensor) -> None:
        self.router.update_balance(load)

    def routing_numbers(self) -> dict[str, Tensor]:
        return self.router.routing_numbers()


class _Dispatch(torch.autograd.Function):
    """Repeats each row k times and reorders the copies.

    order: [T] the source of each output row among the T = k · rows copies, a row's k copies being
    neighbours; inverse: [T] the inverse permutation. The backward gathers and sums k neighbours,
    without atomic adds, so it is deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        if ctx.k > 1:
            grad = grad.unflatten(0, (-1, ctx.k)).sum(dim=1)
        return grad, None, None, None
