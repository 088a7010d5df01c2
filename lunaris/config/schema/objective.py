"""The schemas of training objectives. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component, changeable, key


@dataclass
class ObjectiveConfig(Component):
    """What turns a model and a batch into named losses."""

    _group_ = "objective"


@dataclass
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token."""

    _target_: str = "lunaris.objective.next_token.NextToken"
    # The weight of the mean log² Z of the output softmax (PaLM: 1e-4); 0: none.
    z_loss_weight: float = changeable(0.0, low=0)
    # c in c · tanh(logits / c) (Gemma 2: 30), in training, evaluation and generation; null: none.
    logit_soft_cap: float | None = key(None, above=0)


@dataclass
class MultiTokenConfig(NextTokenConfig):
    """The next token and the `depth` tokens after it (arXiv 2412.19437, section 2.2)."""

    _target_: str = "lunaris.objective.multi_token.MultiToken"
    # How many further tokens each position predicts, one more block each.
    depth: int = key(1, low=1)
    # The weight of the mean over the depths of their losses.
    loss_weight: float = changeable(0.3, low=0)
