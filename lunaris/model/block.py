"""One decoder block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lunaris.model.attention import Attention
from lunaris.model.cache import LayerCache
from lunaris.model.layers import RMSNorm


class Block(nn.Module):
    """Attention and a feed-forward, each added to the residual stream ([B, L, D]).

    norm="qk_reorder": h = x + Attn(x), out = h + FFN(RMSNorm(h)), with no norm before attention;
    norm="pre": h = x + Attn(RMSNorm(x)), out = h + FFN(RMSNorm(h)).
    """

    def __init__(
        self, attention: Attention, feed_forward: nn.Module, d_model: int, norm: str, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model) if norm == "pre" else nn.Identity()
        self.attention = attention
        self.feed_forward_norm = RMSNorm(d_model)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the residual stream and the feed-forward's routing statistics (None if dense)."""
        attended = self.attention(self.attention_norm(x), cos, sin, mask, cache)
        h = x + self.dropout(attended)
        y, stats = self.feed_forward(self.feed_forward_norm(h))
        return h + y, stats
