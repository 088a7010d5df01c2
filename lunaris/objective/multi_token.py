"""Multi-token prediction (arXiv 2412.19437, section 2.2).

Shapes: B sequences, L positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lunaris.model.attention.base import AttentionFactory
from lunaris.model.block import Block
from lunaris.model.feed_forward import FeedForwardFactory
from lunaris.model.layers import ModelShape
from lunaris.model.lookahead import Predictor
from lunaris.model.loss import vocabulary_loss
from lunaris.objective.base import Batch, Loss, ObjectiveOutput
from lunaris.objective.next_token import NextToken


class MultiToken(NextToken):
    """The next token and, by one further block a depth, each of the `depth` tokens after it.

    Depth k is the loss `mtp_k`: the summed cross-entropy of its targets over the number of the main
    targets (eq. 24), with the weight loss_weight / depth (eq. 25). Evaluation computes `main` only.
    """

    def __init__(self, *, depth: int, loss_weight: float, **next_token: Any) -> None:
        """next_token: the keys of `NextToken`; the cap holds in all depths, the z-loss in main."""
        super().__init__(**next_token)
        self._depth = depth
        self._weight = loss_weight / depth

    def predictors(
        self, shape: ModelShape, attention: AttentionFactory, feed_forward: FeedForwardFactory
    ) -> list[Predictor]:
        """Return the module of each depth, with the attention and feed-forward of a last layer."""
        layers = range(shape.n_layers, shape.n_layers + self._depth)
        blocks = [Block(attention(i, shape), feed_forward(i, shape), shape) for i in layers]
        return [Predictor(block, shape) for block in blocks]

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Return the losses `main`, `z` where it has a weight, `mtp_1`, …, and `aux`."""
        if not model.training:
            return super().__call__(model, batch)
        targets, documents = batch["targets"], batch.get("documents")
        count = (targets >= 0).sum().clamp_min(1)

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return self.vocabulary_loss(hidden, weight, targets)._asdict()

        def ahead(depth: int, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            wanted = later_targets(targets, documents, depth)
            loss = vocabulary_loss(hidden, weight, wanted, soft_cap=self._soft_cap)
            return {f"mtp_{depth}": loss.cross_entropy * ((wanted >= 0).sum() / count)}

        out = model(batch["tokens"], head=head, ahead=ahead, documents=documents)
        losses = self.named(out.outputs["cross_entropy"], out.outputs["z"])
        for depth in range(1, self._depth + 1):
            losses[f"mtp_{depth}"] = Loss(out.outputs[f"mtp_{depth}"], self._weight)
        return ObjectiveOutput.of(losses, out)


def later_targets(targets: Tensor, documents: Tensor | None, depth: int) -> Tensor:
    """Return the targets of a depth ([B, L − depth] int64): those `depth` places later.

    Where the later token belongs to another document than the position, there is none.
    """
    later = targets[:, depth:]
    if documents is None:
        return later
    return later.masked_fill(documents[:, depth:] != documents[:, :-depth], -100)
