"""Sliding-window attention (arXiv 2004.05150, section 3.1), with full attention in some layers."""

from __future__ import annotations

from lunaris.model.attention.gqa import GroupedQueryAttention
from lunaris.model.layers import ModelShape


class SlidingWindowFactory:
    """Grouped-query attention within a window, and without one in every n-th layer.

    A position attends to itself and the window - 1 positions before it.
    """

    def __init__(
        self,
        *,
        window: int,
        full_every: int | None,
        output_gate: bool = False,
        sinks: bool = False,
        ranges: str = "auto",
    ) -> None:
        """full_every: the layers n - 1, 2n - 1, … (from 0) attend to all positions; None: none."""
        self._window = window
        self._full_every = full_every
        self._keys = {"output_gate": output_gate, "sinks": sinks, "masked": ranges == "masked"}

    def __call__(self, layer: int, shape: ModelShape) -> GroupedQueryAttention:
        full = self._full_every is not None and (layer + 1) % self._full_every == 0
        window = None if full else self._window
        return GroupedQueryAttention(shape, window=window, **self._keys)
