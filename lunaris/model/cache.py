"""Keys and values of the positions seen so far."""

from __future__ import annotations

import torch
from torch import Tensor


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
        self.length = 0
        self._data = torch.empty(
            n_layers, 2, batch, n_kv_heads, max_len, head_dim, device=device, dtype=dtype
        )

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v ([B, G, L, K]) of a layer; return all positions' ([B, G, S, K])."""
        end = self.length + k.size(2)
        keys, values = self._data[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end].to(k.dtype), values[:, :, :end].to(v.dtype)

    def advance(self, new: int) -> None:
        """Count `new` positions, once every layer has stored them."""
        self.length += new
