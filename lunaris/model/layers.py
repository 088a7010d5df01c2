"""The layers, and the shape of a model, that attention and feed-forwards share.

Shapes: B sequences, L positions, D model width, H hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., dim] in the dtype of x."""
        return F.rms_norm(x.float(), (self.dim,), self.weight.float(), self.eps).type_as(x)

    def parameter_roles(self) -> dict[str, Role]:
        """Return the scale's role."""
        return {"weight": Role.NORM}


class SwiGLU(nn.Module):
    """(silu(x W_gate) · x W_up) W_down with gate and up fused (arXiv 2002.05202, eq. 6)."""

    def __init__(self, d_model: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] for [..., D]."""
        return self.dropout(self.down(gated(self.gate_up(x))))

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the two projections."""
        return {"gate_up.weight": Role.MATRIX, "down.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT}


def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up ([..., H]) of a fused projection ([..., 2H], gate first)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_hidden(d_model: int, multiplier: float, multiple_of: int) -> int:
    """Return the hidden width: 2/3 · multiplier · d_model, rounded up to `multiple_of`.

    The 2/3 keeps the parameters of a two-matrix feed-forward of that multiplier (arXiv 2002.05202).
    """
    return multiple_of * math.ceil(2 * multiplier * d_model / 3 / multiple_of)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products of x run in: autocast's where it is on, else x's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
