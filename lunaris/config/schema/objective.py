"""The schemas of training objectives. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component


@dataclass
class ObjectiveConfig(Component):
    """What turns a model and a batch into named losses."""


@dataclass
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token."""

    _target_: str = "lunaris.objective.next_token.NextToken"
