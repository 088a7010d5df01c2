"""Grouped-query attention with rotary positions.

Shapes: B sequences, L new positions, S attended positions, D model width, H heads, G key-value
heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunaris.model.attention.base import Attention, Positions, causal_mask
from lunaris.model.attention.rotary import rope_tables, rotate
from lunaris.model.cache import LayerCache
from lunaris.model.layers import ModelShape, RMSNorm
from lunaris.model.roles import Role


class GQAFactory:
    """The same grouped-query attention in every layer."""

    def __call__(self, layer: int, shape: ModelShape) -> GroupedQueryAttention:
        """Return the attention of layer `layer`."""
        return GroupedQueryAttention(shape)


class RotaryInputs(NamedTuple):
    """What the positions of one forward give to attention.

    cos, sin: [L, K/2] float32. mask: bool, broadcastable to [B, H, L, S], True where attended;
    None: causal.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class GroupedQueryAttention(Attention):
    """Causal attention with fused QKV and normalised queries and keys.

    norm="qk_reorder": RMSNorm over the entire query and key projections (QK-Reorder-LN, as in
    EXAONE 4.0, arXiv 2507.11407); norm="pre": RMSNorm over each head.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.d_model // shape.n_heads
        self.n_heads = shape.n_heads
        self.n_kv_heads = shape.n_kv_heads
        self.max_seq_len = shape.max_seq_len
        self.rope_theta = shape.rope_theta
        self.dropout = shape.dropout
        self.widths = [self.n_heads * self.head_dim, *[self.n_kv_heads * self.head_dim] * 2]
        self.qkv = nn.Linear(shape.d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(shape.d_model, shape.d_model, bias=False)
        per_head = shape.norm == "pre"
        self.q_norm = RMSNorm(self.head_dim if per_head else self.widths[0])
        self.k_norm = RMSNorm(self.head_dim if per_head else self.widths[1])

    def prepare(self, positions: Positions) -> RotaryInputs:
        """Return the rotary tables and the mask of these positions; one for all equal layers."""

        def make() -> RotaryInputs:
            cos, sin = rope_tables(
                self.max_seq_len, self.head_dim, self.rope_theta, positions.device
            )
            new = slice(positions.start, positions.end)
            return RotaryInputs(cos[new], sin[new], causal_mask(positions))

        key = (GroupedQueryAttention, self.max_seq_len, self.head_dim, self.rope_theta)
        return positions.shared(key, make)

    def forward(self, x: Tensor, prepared: RotaryInputs, cache: LayerCache | None = None) -> Tensor:
        """Return [B, L, D] for [B, L, D]; see `Attention.forward`."""
        cos, sin, mask = prepared
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

    def new_cache(
        self, batch: int, max_len: int, *, device: torch.device, dtype: torch.dtype
    ) -> LayerCache:
        """Return an empty cache of keys and values."""
        shape = (batch, self.n_kv_heads, max_len, self.head_dim)
        keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        return LayerCache(keys, values)

    def flops_per_token(self, seq_len: int) -> float:
        """Return 12 · D · L: the scores and the weighted values (arXiv 2204.02311, appendix B)."""
        return 12.0 * self.widths[0] * seq_len

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the projections; the norms declare theirs."""
        return {"qkv.weight": Role.MATRIX, "out.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT}

    def _heads(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Normalise [B, L, n·K] over the norm's width and return [B, L, n, K]."""
        normed = norm(x.unflatten(-1, (-1, norm.dim))).flatten(-2)
        return normed.unflatten(-1, (-1, self.head_dim))
