"""The activations that a feed-forward may have between its two products.

Shapes: D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lunaris.config.widths import GATED, first_columns, hidden_width


@dataclass(frozen=True)
class Activation:
    """What a feed-forward computes between its products, and the widths that follow from it.

    function: from the first product's output ([..., columns(H)]) to the second one's input
    ([..., H]). gated: whether the first product computes a gate and a value (fused, gate first).
    """

    function: Callable[[Tensor], Tensor]
    gated: bool

    def columns(self, hidden: int) -> int:
        """Return how many columns the first product's matrix has: 2H with a gate, else H."""
        return first_columns(self.gated, hidden)

    def hidden_width(self, d_model: int, multiplier: float, multiple_of: int) -> int:
        """Return the hidden width H of a feed-forward (`lunaris.config.widths`)."""
        return hidden_width(self.gated, d_model, multiplier, multiple_of)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up ([..., H]) of [..., 2H] (arXiv 2002.05202, eq. 6)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) · up ([..., H]) of [..., 2H] (arXiv 2002.05202, eq. 6), GELU exact."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def relu2(x: Tensor) -> Tensor:
    """Return max(x, 0)² ([..., H]) of [..., H] (arXiv 2109.08668, section 3.1)."""
    return F.relu(x).square()


# By the values of `model.activation`.
ACTIVATIONS = {
    "swiglu": Activation(swiglu, GATED["swiglu"]),
    "geglu": Activation(geglu, GATED["geglu"]),
    "relu2": Activation(relu2, GATED["relu2"]),
}
