"""Keys and values of the positions seen so far.

Shapes: B sequences, G key-value heads, L new positions, S positions in all, K head width.
"""

from __future__ import annotations

import torch
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


class KVCache:
    """A preallocated cache of one batch of sequences, all of the same length."""

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate [n_layers, 2, B, G, max_len, K] in `dtype`."""
        data = torch.empty(
            n_layers, 2, batch, n_kv_heads, max_len, head_dim, device=device, dtype=dtype
        )
        self.layers = [LayerCache(keys, values) for keys, values in data]

    @property
    def length(self) -> int:
        """Positions that every layer has stored."""
        return self.layers[-1].length
