"""The layers, and the shape of a model, that attention and feed-forwards share.

Shapes: D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lunaris.config.widths import WidthFactors, width_factors
from lunaris.model.activation import Activation
from lunaris.model.roles import Role


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The keys of the `model` group from which factories build the parts of each layer."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    max_seq_len: int
    rope_theta: float
    dropout: float
    ffn_hidden_multiplier: float
    multiple_of: int
    norm: str
    activation: str = "swiglu"
    parametrization: str = "standard"
    mup_base_width: int = 128
    mup_base_head_width: int | None = None

    @property
    def factors(self) -> WidthFactors:
        """What the parametrization makes of the width."""
        return width_factors(
            self.parametrization,
            self.d_model,
            self.n_heads,
            self.mup_base_width,
            self.mup_base_head_width,
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6, *, factor: float = 1.0) -> None:
        """factor: multiplies the output; it is not trained."""
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., dim] in the dtype of x."""
        weight = self.weight.float()
        if self.factor != 1:
            weight = weight * self.factor
        return F.rms_norm(x.float(), (self.dim,), weight, self.eps).type_as(x)

    def parameter_roles(self) -> dict[str, Role]:
        return {"weight": Role.NORM}


class FeedForward(nn.Module):
    """Two products with an activation between them: act(x W_gate_up) W_down.

    W_gate_up holds W_gate and W_up next to each other, or W_up alone where the activation has no
    gate.
    """

    def __init__(
        self, d_model: int, hidden: int, activation: Activation, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, activation.columns(hidden), bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)
        self.activate = activation.function
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] for [..., D]."""
        return self.dropout(self.down(self.activate(self.gate_up(x))))

    def parameter_roles(self) -> dict[str, Role]:
        return {"gate_up.weight": Role.MATRIX, "down.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT}


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products of x run in: autocast's where it is on, else x's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
