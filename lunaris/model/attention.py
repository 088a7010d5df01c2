"""Grouped-query attention with rotary positions.

Shapes: B sequences, L new positions, S attended positions, H heads, G key-value heads, K head
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunaris.model.cache import LayerCache
from lunaris.model.layers import RMSNorm
from lunaris.model.roles import Role


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ([length, K/2] float32) of rotary positions (arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x ([B, L, H, K]) by its positions (cos, sin: [L, K/2]), in float32.

    The pair (i, i + K/2) is one plane, as in Hugging Face's models.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x)


class Attention(nn.Module):
    """Causal attention with fused QKV and normalised queries and keys.

    norm="qk_reorder": RMSNorm over the whole query and key projections (QK-Reorder-LN, as in EXAONE
    4.0, arXiv 2507.11407); norm="pre": RMSNorm over each head.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, *, norm: str, dropout: float
    ) -> None:
        super().__init__()
        self.head_dim = d_model // n_heads
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.widths = [n_heads * self.head_dim, *[n_kv_heads * self.head_dim] * 2]
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        whole = norm == "qk_reorder"
        self.q_norm = RMSNorm(self.widths[0] if whole else self.head_dim)
        self.k_norm = RMSNorm(self.widths[1] if whole else self.head_dim)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return [B, L, D] for [B, L, D].

        cos, sin: [L, K/2] of the positions of x. mask: bool, broadcastable to [B, H, L, S], True
        where attended; None: causal. cache: keys and values of earlier positions; extended.
        """
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q = rotate(self._heads(q, self.q_norm), cos, sin).transpose(1, 2)
        k = rotate(self._heads(k, self.k_norm), cos, sin).transpose(1, 2)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        grouped = self.n_kv_heads < self.n_heads
        # Of the fast kernels only flash attention takes groups: half precision without a mask.
        in_kernel = q.is_cuda and mask is None and q.dtype in (torch.bfloat16, torch.float16)
        if grouped and not in_kernel:
            repeats = self.n_heads // self.n_kv_heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.size(2) > 1,
            enable_gqa=grouped and in_kernel,
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the projections; the norms declare their own."""
        return {"qkv.weight": Role.MATRIX, "out.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT}

    def _heads(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Normalise [B, L, n·K] over the norm's width and return [B, L, n, K]."""
        normed = norm(x.unflatten(-1, (-1, norm.dim))).flatten(-2)
        return normed.unflatten(-1, (-1, self.head_dim))
