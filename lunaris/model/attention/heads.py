"""What the attentions of this package share: the product of their heads, sinks and output gates.

Shapes: B sequences, L new positions, S attended positions, D model width, H heads, G key-value
heads, K width of a query and a key, V width of a value.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunaris.model.attention.ranges import attend_ranges
from lunaris.model.roles import Role


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    first: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(scale · q kᵀ) v ([B, H, L, V]) over the attended positions.

    q: [B, H, L, K]; k: [B, G, S, K]; v: [B, G, S, V]; head h reads the keys and values h // (H/G).
    mask: bool, broadcastable to [B, H, L, S], True where attended; None: causal, or all positions
    for one new position. first: [B, L] or [1, L], where the range of attended positions begins that
    ends at each position (`lunaris.model.attention.ranges`), in place of a mask and where no weight
    is dropped. scale: None is K^-1/2. sinks: [H], a logit of each head that adds its exponential to
    the sum below the softmax's fraction and has no value. dropout: the probability that a weight is
    dropped.
    """
    heads, length, width = q.size(1), q.size(2), v.size(3)
    if scale is None:
        scale = 1 / math.sqrt(q.size(3))
    if sinks is not None and length == 1 and mask is None and dropout == 0:
        return _one_with_sinks(q, k, v, sinks, scale)
    # A constant also where this is compiled for any length.
    causal = True if mask is None and first is None and length > 1 else False
    few = length == 1 if mask is None else mask.dim() == 2 and length < k.size(2)
    few = few and first is None
    if width != q.size(3):  # The fast kernels need equal widths.
        widest = max(width, q.size(3))
        q, k, v = (F.pad(x, (0, widest - x.size(3))) for x in (q, k, v))
    if sinks is not None:
        q, k, v, mask = _with_sinks(q, k, v, mask, sinks, scale, first_query=causal)
    groups = k.size(1)
    rows_of_heads = few and groups < heads
    if q.is_cuda:
        # Of the fast kernels only flash attention takes groups: half precision without a mask.
        half = q.dtype in (torch.bfloat16, torch.float16)
        in_kernel = first is not None or (mask is None and half)
    else:
        # In half precision the CPU's kernel would add up a group's gradients in half precision.
        in_kernel = q.dtype == torch.float32 and dropout == 0
    if rows_of_heads:
        # All heads of a group see the same keys: they are rows of one product, without copies.
        q = q.reshape(q.size(0), groups, heads // groups * length, q.size(3))
        mask = None if mask is None else mask.repeat(heads // groups, 1)
    elif groups < heads and not in_kernel:
        repeats = heads // groups
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if first is not None:
        y = attend_ranges(q, k, v, first, scale=scale, sink=sinks is not None)
        return y[..., :width]
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.size(1) > k.size(1),
    )
    if rows_of_heads:
        y = y.reshape(y.size(0), heads, length, y.size(3))
    return y[:, :, -length:, :width]


def _with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    scale: float,
    *,
    first_query: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Add a first key whose score is each head's sink and whose value is 0; K = V here.

    The score is a product like any other, over one more column, so that every kernel computes it;
    its width stays a multiple of 8, which they need. first_query: a first query comes in as well,
    so that a causal square stays one.
    """
    width = q.size(3)
    more = 8 - width % 8
    q = F.pad(q, (0, more, int(first_query), 0))
    k = F.pad(k, (0, more, 1, 0))
    v = F.pad(v, (0, more, 1, 0))
    q[..., width] = (sinks / scale).to(q.dtype)[:, None]
    k[:, :, 0, width] = 1.0
    return q, k, v, None if mask is None else F.pad(mask, (1, 0), value=True)


def _one_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Return what `attend` does for one new position, without a copy of the keys and values."""
    q = q.reshape(q.size(0), k.size(1), -1, q.size(3))  # all heads of a group as rows
    scores = ((q * scale) @ k.mT).float()  # [B, G, H/G, S]
    column = sinks.float().view(k.size(1), -1, 1).expand(q.size(0), -1, -1, -1)
    weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1].to(v.dtype)
    return (weights @ v).reshape(q.size(0), -1, 1, v.size(3))


class OutputGate(nn.Module):
    """Scales each head's output by a sigmoid of the layer's input.

    One number a head and position: the headwise gate after the attention product of Gated
    Attention (arXiv 2505.06708, section 2.2).
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads, d_model))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return σ(W x) · y ([B, H, L, V]) for the input x ([B, L, D]) and heads y."""
        return y * F.linear(x, self.weight).sigmoid().transpose(1, 2)[..., None]

    def parameter_roles(self) -> dict[str, Role]:
        """Return the role of the gate's weights."""
        return {"weight": Role.MATRIX}
