"""What attention keeps of the positions seen so far.

Shapes: B sequences, G key-value heads, L new positions, S positions in all, K head width, C width
of what a position leaves behind, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = length


class WindowCache:
    """Keys and values of the last W positions of one layer, in a ring: position p is at p mod W."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [B, G, W, K], memory that this cache fills."""
        self.length = 0
        self._keys = keys
        self._values = values
        # What the last call of `extend` with several positions returned, for `truncate`.
        self._last: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v ([B, G, L, K]); return those that the new positions attend to.

        They are those of up to W - 1 earlier positions and then the new ones, in the order of their
        positions; for one new position, whose attention needs no order, in the order of the ring.
        """
        new, size = k.size(2), self._keys.size(2)
        earlier = min(self.length, size - 1)
        if new == 1:
            slot = self.length % size
            self._keys[:, :, slot] = k[:, :, 0]
            self._values[:, :, slot] = v[:, :, 0]
            seen = slice(0, earlier + 1)
            self.length += 1
            self._last = None
            return self._keys[:, :, seen].to(k.dtype), self._values[:, :, seen].to(v.dtype)
        before = self._slots(self.length - earlier, self.length)
        keys = torch.cat((self._keys[:, :, before].to(k.dtype), k), dim=2)
        values = torch.cat((self._values[:, :, before].to(v.dtype), v), dim=2)
        self.length += new
        self._store(k, v)
        self._last = keys, values
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on: some of those that the last `extend` brought."""
        gone = self.length - length
        if not gone:
            return
        if not length:
            self.length, self._last = 0, None
            return
        assert self._last is not None, "only several positions can be taken back"
        keys, values = (held[:, :, :-gone] for held in self._last)
        self.length, self._last = length, (keys, values)
        self._store(keys, values)

    def _store(self, k: Tensor, v: Tensor) -> None:
        """Write the last of these keys and values, up to W of them; the newest is `length` − 1."""
        kept = min(k.size(2), self._keys.size(2))
        slots = self._slots(self.length - kept, self.length)
        self._keys[:, :, slots] = k[:, :, -kept:].to(self._keys.dtype)
        self._values[:, :, slots] = v[:, :, -kept:].to(self._values.dtype)

    def _slots(self, start: int, end: int) -> Tensor:
        """Return where positions [start, end) are in the ring ([end - start] int64)."""
        return torch.arange(start, end, device=self._keys.device) % self._keys.size(2)


class LatentCache:
    """One vector a position of one layer, from which all heads compute their keys and values."""

    def __init__(self, latents: Tensor) -> None:
        """latents: [B, max_len, C], of which the first `length` positions are filled."""
        self.length = 0
        self._latents = latents

    def extend(self, latents: Tensor) -> Tensor:
        """Store latents ([B, L, C]); return those of all positions ([B, S, C])."""
        end = self.length + latents.size(1)
        self._latents[:, self.length : end] = latents
        self.length = end
        return self._latents[:, :end].to(latents.dtype)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = length


@dataclass
class KVCache:
    """The caches of all layers, each made by its attention, for one batch of equal lengths."""

    layers: list[Any]
    length: int = 0  # positions that every layer holds

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on: some of those that the last forward added."""
        if length < self.length:
            for layer in self.layers:
                layer.truncate(length)
            self.length = length
