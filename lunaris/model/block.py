"""One decoder block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lunaris.model.attention.base import Attention
from lunaris.model.feed_forward import RoutingStats
from lunaris.model.layers import ModelShape, RMSNorm
from lunaris.model.recompute import Run, keep_all


class Block(nn.Module):
    """Attention and a feed-forward, each added to the residual stream ([B, L, D]).

    norm="qk_reorder": h = x + Attn(x), out = h + FFN(RMSNorm(h)), with no norm before attention;
    norm="pre": h = x + Attn(RMSNorm(x)), out = h + FFN(RMSNorm(h)).
    """

    def __init__(self, attention: Attention, feed_forward: nn.Module, shape: ModelShape) -> None:
        super().__init__()
        pre = shape.norm == "pre"
        self.attention_norm = RMSNorm(shape.d_model) if pre else nn.Identity()
        self.attention = attention
        self.feed_forward_norm = RMSNorm(shape.d_model)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(shape.dropout)
        self.run: Run = keep_all

    def forward(
        self, x: Tensor, prepared: Any, cache: Any = None, documents: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """Return the residual stream and the feed-forward's routing statistics (None if dense).

        prepared, cache: as `Attention.forward` takes them. documents: [B, L] int64 or None, for
        the feed-forward; attention has them in `prepared`.
        """
        run = self.run if cache is None else keep_all
        return run(self._compute, x, prepared, cache, documents)

    def _compute(
        self, x: Tensor, prepared: Any, cache: Any, documents: Tensor | None
    ) -> tuple[Tensor, RoutingStats | None]:
        attended = self.attention(self.attention_norm(x), prepared, cache)
        h = x + self.dropout(attended)
        y, stats = self.feed_forward(self.feed_forward_norm(h), documents)
        return h + y, stats
