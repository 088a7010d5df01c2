"""Keys and values of the positions seen so far.

Shapes: B sequences, G key-value heads, L new positions, S positions in all, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [B, G, max_len, K], of which the first `length` positions are filled."""
        self.length = 0
        self._keys = keys
        self._values = values

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v ([B, G, L, K]); return those of all positions ([B, G, S, K])."""
        end = self.length + k.size(2)
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length = end
        return self._keys[:, :, :end].to(k.dtype), self._values[:, :, :end].to(v.dtype)


@dataclass
class KVCache:
    """The caches of all layers, each made by its attention, for one batch of equal lengths."""

    layers: list[Any]
    length: int = 0  # positions that every layer holds
