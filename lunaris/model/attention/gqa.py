"""Grouped-query attention with rotary positions.

Shapes: B sequences, L new positions, S attended positions, D model width, H heads, G key-value
heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lunaris.model.attention.base import Attention, Positions, causal_mask
from lunaris.model.attention.heads import OutputGate, attend
from lunaris.model.attention.ranges import first_attended, has_kernel, ranges_mask
from lunaris.model.attention.rotary import rope_tables, rotate
from lunaris.model.cache import LayerCache, WindowCache
from lunaris.model.layers import ModelShape, RMSNorm
from lunaris.model.roles import Role


class GQAFactory:
    """The same grouped-query attention in every layer."""

    def __init__(
        self, *, output_gate: bool = False, sinks: bool = False, ranges: str = "auto"
    ) -> None:
        """Keys as of `GroupedQueryAttention`; ranges: `auto` or `masked`."""
        self._keys = {"output_gate": output_gate, "sinks": sinks, "masked": ranges == "masked"}

    def __call__(self, layer: int, shape: ModelShape) -> GroupedQueryAttention:
        return GroupedQueryAttention(shape, **self._keys)


class RotaryInputs(NamedTuple):
    """What the positions of one forward give to attention.

    cos, sin: [L, K/2] float32. mask: bool, broadcastable to [B, H, L, S], True where attended;
    first: [B, L] or [1, L] int64, the first attended position of each; both None: causal.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    first: Tensor | None = None


def rotary_inputs(
    positions: Positions,
    shape: ModelShape,
    width: int,
    *,
    head_width: int,
    window: int | None = None,
    masked: bool = False,
) -> RotaryInputs:
    """Return the rotary tables of heads of `width` and the mask; one for all equal layers.

    head_width: of queries, keys and values, the widest. masked: documents and windows are computed
    by a mask, as they are where no kernel takes their ranges.
    """
    masked = masked or not has_kernel(positions.device, head_width)

    def make() -> RotaryInputs:
        cos, sin = rope_tables(shape.max_seq_len, width, shape.rope_theta, positions.device)
        new = slice(positions.start, positions.end)
        if positions.start > 0:
            return RotaryInputs(cos[new], sin[new], causal_mask(positions, window), None)
        first = first_attended(positions, window)
        if first is not None and masked:
            return RotaryInputs(cos[new], sin[new], ranges_mask(first))
        return RotaryInputs(cos[new], sin[new], None, first)

    key = (RotaryInputs, shape.max_seq_len, width, shape.rope_theta, window, masked)
    return positions.shared(key, make)


class GroupedQueryAttention(Attention):
    """Causal attention (arXiv 2305.13245) with fused QKV and normalised queries and keys.

    norm="qk_reorder": RMSNorm over the entire query and key projections (QK-Reorder-LN, as in
    EXAONE 4.0, arXiv 2507.11407); norm="pre": RMSNorm over each head.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        window: int | None = None,
        output_gate: bool = False,
        sinks: bool = False,
        masked: bool = False,
    ) -> None:
        """window: positions that each attends to, itself included; None: all up to itself.

        output_gate: gate each head's output (`OutputGate`). sinks: give each head a learned logit
        in the sum below its softmax (`attend`). masked: compute windows and documents by a mask of
        all pairs of positions.
        """
        super().__init__()
        self.shape = shape
        self.window = window
        self.masked = masked
        self.head_dim = shape.d_model // shape.n_heads
        self.n_kv_heads = shape.n_kv_heads
        self.widths = [shape.n_heads * self.head_dim, *[shape.n_kv_heads * self.head_dim] * 2]
        self.qkv = nn.Linear(shape.d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(shape.d_model, shape.d_model, bias=False)
        per_head = shape.norm == "pre"
        normed = self.head_dim if per_head else self.widths[0]
        self.q_norm = RMSNorm(normed, factor=shape.factors.scores)
        self.k_norm = RMSNorm(self.head_dim if per_head else self.widths[1])
        self.gate = OutputGate(shape.d_model, shape.n_heads) if output_gate else None
        self.sinks = nn.Parameter(torch.empty(shape.n_heads)) if sinks else None

    def prepare(self, positions: Positions) -> RotaryInputs:
        """Return the rotary tables and the mask of these positions."""
        # The kernels of ranges drop no weights.
        masked = self.masked or (self.training and self.shape.dropout > 0)
        width, window = self.head_dim, self.window
        return rotary_inputs(
            positions, self.shape, width, head_width=width, window=window, masked=masked
        )

    def forward(
        self, x: Tensor, prepared: RotaryInputs, cache: LayerCache | WindowCache | None = None
    ) -> Tensor:
        """Return [B, L, D] for [B, L, D]; see `Attention.forward`."""
        cos, sin, mask, first = prepared
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q = rotate(self._heads(q, self.q_norm), cos, sin).transpose(1, 2)
        k = rotate(self._heads(k, self.k_norm), cos, sin).transpose(1, 2)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.shape.dropout if self.training else 0.0
        if first is not None and cache is not None and x.is_cuda:
            # FlexAttention is compiled for each length, and prompts have any.
            mask, first = ranges_mask(first), None
        y = attend(q, k, v, mask, first=first, sinks=self.sinks, dropout=dropout)
        if self.gate is not None:
            y = self.gate(x, y)
        return self.out(y.transpose(1, 2).flatten(2))

    def new_cache(
        self, batch: int, max_len: int, *, device: torch.device, dtype: torch.dtype
    ) -> LayerCache | WindowCache:
        """Return an empty cache of keys and values: of all positions, or of those in the window."""
        length = max_len if self.window is None else min(max_len, self.window)
        shape = (batch, self.n_kv_heads, length, self.head_dim)
        keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        kind = LayerCache if self.window is None else WindowCache
        return kind(keys, values)

    def flops_per_token(self, seq_len: int) -> float:
        """Return 12 · D · S: the scores and the weighted values (arXiv 2204.02311, appendix B).

        S is the sequence's length, or the window where that is less. As there, positions that a
        causal mask hides are counted.
        """
        attended = seq_len if self.window is None else min(seq_len, self.window)
        return 12.0 * self.widths[0] * attended

    def parameter_roles(self) -> dict[str, Role]:
        """Return the roles of the projections and the sinks; norms and gate declare theirs."""
        return {
            "qkv.weight": Role.MATRIX,
            "out.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT,
            "sinks": Role.BIAS,
        }

    def _heads(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Normalise [B, L, n·K] over the norm's width and return [B, L, n, K]."""
        normed = norm(x.unflatten(-1, (-1, norm.dim))).flatten(-2)
        return normed.unflatten(-1, (-1, self.head_dim))
