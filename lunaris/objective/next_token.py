"""Next-token prediction."""

from __future__ import annotations

from torch import Tensor, nn

from lunaris.model.loss import linear_cross_entropy
from lunaris.objective.base import Batch, Loss, Objective, ObjectiveOutput


class NextToken(Objective):
    """The mean cross-entropy of each position's target, in nats a target."""

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Return the loss `main` of a batch, and the routing losses `aux`."""

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return {"main": linear_cross_entropy(hidden, weight, batch["targets"])}

        out = model(batch["tokens"], head=head, documents=batch.get("documents"))
        return ObjectiveOutput.of({"main": Loss(out.outputs["main"])}, out)

    def count_targets(self, batch: Batch) -> Tensor:
        """Return how many targets there are ([] or [A] int64)."""
        return (batch["targets"] >= 0).sum(dim=(-2, -1))

    def targets_vary(self, batch: Batch) -> bool:
        """Return whether documents are masked: without it every position has a target."""
        return "documents" in batch
