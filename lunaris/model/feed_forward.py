"""The contract of a feed-forward: what the transformer asks of a module, and of its factory.

Shapes: B sequences, L positions, D model width, E experts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from lunaris.model.layers import ModelShape


class FeedForwardFactory(Protocol):
    """Builds the feed-forward of each layer; layers may differ. The `moe` group chooses one."""

    def __call__(self, layer: int, shape: ModelShape) -> nn.Module:
        """Return a module from x, [B, L, D], to ([B, L, D], RoutingStats or None).

        Its forward also gets the document of each position ([B, L] int64), or None where each
        sequence is one document. A document's output does not depend on another document.
        """


class RoutingStats(NamedTuple):
    """What one call of a routed feed-forward reports about its routing.

    They are returned, not stored, so that a recomputed forward does not count twice. loss: []
    float32, weighted, with a gradient. The others have none. load: [E] float32, tokens sent to
    each expert before drops. dropped: [] float32, assignments dropped by capacity. confidence: []
    float32, the mean over tokens of the largest gate; None where there is no such number. experts:
    [B, L, k] int64, the choice of each token, in evaluation only.
    """

    loss: Tensor
    load: Tensor
    dropped: Tensor
    confidence: Tensor | None = None
    experts: Tensor | None = None


class RoutedFeedForward(nn.Module):
    """Base of a feed-forward that routes tokens to experts and returns RoutingStats."""

    def idle_parameters(self) -> int:
        """Return how many parameters a token does not pass through."""
        raise NotImplementedError

    def update_balance(self, load: Tensor) -> None:
        """Balance the experts, once an optimizer step.

        load: [E] float32, tokens of the step over all micro-steps and processes.
        """
        raise NotImplementedError

    def routing_numbers(self) -> dict[str, Tensor]:
        """Return what else is logged of the routing, [] each, as `moe/layer_NN/NAME`.

        Called when a row is logged, after the step; every process has the same numbers.
        """
        return {}
