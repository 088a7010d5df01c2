"""Next-token prediction."""

from __future__ import annotations

from torch import Tensor, nn

from lunaris.model.loss import VocabularyLoss, soft_capped, vocabulary_loss
from lunaris.model.transformer import vocabulary_logits
from lunaris.objective.base import Batch, Loss, Objective, ObjectiveOutput


class NextToken(Objective):
    """The mean cross-entropy of each position's target, in nats a target."""

    def __init__(self, *, z_loss_weight: float = 0.0, logit_soft_cap: float | None = None) -> None:
        """z_loss_weight: the factor of the mean log² Z (0: none). logit_soft_cap: None for none."""
        self._z_weight = z_loss_weight
        self._soft_cap = logit_soft_cap

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Return the loss `main` of a batch, `z` where it has a weight, and the routing's `aux`."""

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return self.vocabulary_loss(hidden, weight, batch["targets"])._asdict()

        out = model(batch["tokens"], head=head, documents=batch.get("documents"))
        return ObjectiveOutput.of(self.named(out.outputs["cross_entropy"], out.outputs["z"]), out)

    def vocabulary_loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> VocabularyLoss:
        """Return the losses of hidden states [B, L, D] against targets [B, L]; weight: [V, D]."""
        return vocabulary_loss(
            hidden, weight, targets, soft_cap=self._soft_cap, z_weight=self._z_weight
        )

    def named(self, main: Tensor, z: Tensor) -> dict[str, Loss]:
        """Return the losses by name, with their weights; both are [] float32."""
        losses = {"main": Loss(main)}
        if self._z_weight:
            losses["z"] = Loss(z, self._z_weight)
        return losses

    def logits(self, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return the `logits` [B, L, V] of hidden states, capped as in training."""
        logits = vocabulary_logits(hidden, weight)["logits"]
        return {"logits": soft_capped(logits, self._soft_cap)}

    def count_targets(self, batch: Batch) -> Tensor:
        return (batch["targets"] >= 0).sum(dim=(-2, -1))

    def targets_vary(self, batch: Batch) -> bool:
        """Return whether documents or a part of the targets are masked."""
        return "documents" in batch or "loss_mask" in batch
