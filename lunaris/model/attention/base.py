"""The contract of attention: what the transformer asks of a module, and of the factory behind it.

Shapes: B sequences, L new positions, S attended positions, D model width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lunaris.model.layers import ModelShape

T = TypeVar("T")


@dataclass(frozen=True)
class Positions:
    """The positions [start, end) that one forward computes, and what its layers share about them.

    start: positions that the cache holds already. documents: [B, L] int64, the document of each
    position, within which attention stays; None: each sequence is one document.
    """

    start: int
    end: int
    device: torch.device
    documents: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns, called once per forward for all layers that give `key`."""
        if key not in self._made:
            self._made[key] = make()
        result: T = self._made[key]
        return result


class Attention(nn.Module):
    """Base of every attention: mixes positions, [B, L, D] to [B, L, D].

    It declares its parameters in `parameter_roles` (`lunaris.model.roles`). It draws random numbers
    (dropout) only where the model's `dropout` is above 0.
    """

    def prepare(self, positions: Positions) -> Any:
        """Return what `forward` needs about the positions (rotary tables, masks): tensors only.

        It is called for every layer before its block, outside of compilation and recomputation.
        `positions.shared` computes once what several layers need.
        """
        return None

    def forward(self, x: Tensor, prepared: Any, cache: Any = None) -> Tensor:
        """Return [B, L, D] for [B, L, D].

        prepared: the result of `prepare`. cache: the result of `new_cache` with the earlier
        positions, to which this call adds those of x; None: x starts at position 0.
        """
        raise NotImplementedError

    def new_cache(
        self, batch: int, max_len: int, *, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """Return an empty cache of this layer for `batch` sequences of up to `max_len` positions.

        dtype: that of the matrix products. A cache with a method `truncate(length)`, which forgets
        the positions from `length` on, serves `lunaris generate --speculative` as well; it only
        takes back what the last forward added.
        """
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward a token, the products with parameters aside."""
        raise NotImplementedError


class AttentionFactory(Protocol):
    """Builds the attention of each layer; layers may differ."""

    def __call__(self, layer: int, shape: ModelShape) -> Attention:
        """Return the attention of layer `layer`, counted from 0."""


def causal_mask(positions: Positions, window: int | None = None) -> Tensor | None:
    """Return which positions are attended (bool, broadcastable to [B, H, L, S]).

    window: how many positions are attended, the position itself included; None: all up to it. The
    S positions end at `positions.end`; with a window they begin window - 1 before the first new
    one. None where a kernel needs no mask: sequences of one document from position 0 on that fit
    into the window, or one new position, attend all positions up to themselves.
    """

    def make() -> Tensor | None:
        start, end, documents = positions.start, positions.end, positions.documents
        from_zero = start == 0 and (window is None or end <= window)
        if documents is None and (from_zero or end - start == 1):
            return None
        at = torch.arange(end, device=positions.device)
        first = 0 if window is None else max(0, start - window + 1)
        back = at[start:, None] - at[first:]
        mask = back >= 0 if window is None else (back >= 0) & (back < window)
        if documents is None:
            return mask
        assert start == 0, "documents need sequences that begin at position 0"
        return (mask & (documents[:, :, None] == documents[:, None, :]))[:, None]

    return positions.shared(("causal_mask", window), make)
