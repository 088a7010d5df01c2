"""The contract of an objective: what training minimises, computed from a model and a batch.

A batch is a dict of tensors, [B, L] each: `tokens` and `targets` (int64; −100 where there is no
target) and, with document masking, `documents` (int64, the document's number in its sequence).
With data that has a loss mask, `loss_mask` (bool) says which targets it keeps.

Shapes: A micro-steps, B sequences, L positions, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lunaris.model.attention.base import AttentionFactory
from lunaris.model.feed_forward import FeedForwardFactory
from lunaris.model.layers import ModelShape
from lunaris.model.lookahead import Predictor
from lunaris.model.transformer import ModelOutput, vocabulary_logits

Batch = dict[str, Tensor]


class Loss(NamedTuple):
    """One term of the training loss, logged as `train/NAME_loss`.

    value: [] float32 with a gradient. weight: its factor in the sum that training minimises.
    per_target: whether value is a mean over the targets that `count_targets` counts, so that a
    micro-step weighs by their number; otherwise it is a mean over sequences, of which all
    micro-steps have as many.
    """

    value: Tensor
    weight: float = 1.0
    per_target: bool = True


@dataclass(frozen=True)
class ObjectiveOutput:
    """The losses of one batch, and its routing.

    losses: by name; `main` (nats a target) is always there, is what evaluation reports, and comes
    first. The others are those of `ModelOutput`.
    """

    losses: dict[str, Loss]
    load: Tensor
    dropped: Tensor
    confidence: Tensor
    experts: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, losses: dict[str, Loss], out: ModelOutput) -> ObjectiveOutput:
        """Return these losses, and the routing losses (`aux`) and statistics of a forward."""
        aux = Loss(out.aux_loss, per_target=False)
        return cls({**losses, "aux": aux}, out.load, out.dropped, out.confidence, out.experts)

    def scaled(self, target_share: float | Tensor, micro_steps: int) -> ObjectiveOutput:
        """Return the part of a step's losses that this micro-step contributes.

        target_share: [] the micro-step's share of the step's targets.
        """
        losses = {
            name: loss._replace(
                value=loss.value * target_share if loss.per_target else loss.value / micro_steps
            )
            for name, loss in self.losses.items()
        }
        return replace(self, losses=losses)

    @property
    def total(self) -> Tensor:
        """The weighted sum of the losses []."""
        return reduce(torch.add, [loss.weight * loss.value for loss in self.losses.values()])


class Objective:
    """Base of every objective."""

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Return the losses of a batch.

        model: a Transformer as `Parallelism.wrap` returns it. Whatever reads its parameters runs
        inside its forward, for instance as `head`, because FSDP gathers them there.
        """
        raise NotImplementedError

    def predictors(
        self, shape: ModelShape, attention: AttentionFactory, feed_forward: FeedForwardFactory
    ) -> list[Predictor]:
        """Return the further modules that the objective trains, which the model then holds.

        They are built on the meta device and become part of the model: initialised, sharded,
        compiled, saved and counted like its blocks. A forward with `ahead` runs them in order.
        """
        return []

    def logits(self, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return the `logits` ([B, L, V] float32) that text is generated from.

        A `Head` of the model: hidden: [B, L, D] the last hidden states; weight: [V, D]. An
        objective that changes the logits before its softmax changes them here alike.
        """
        return vocabulary_logits(hidden, weight)

    def count_targets(self, batch: Batch) -> Tensor:
        """Return how many targets there are: [] int64, or [A] for a batch of [A, B, L] tensors."""
        raise NotImplementedError

    def targets_vary(self, batch: Batch) -> bool:
        """Return whether micro-steps may have different numbers of targets.

        Where they may not, a step saves the exchange of the counts between processes.
        """
        return True
