"""The schemas of attention. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component


@dataclass
class AttentionConfig(Component):
    """What builds the attention of each layer."""


@dataclass
class GQAConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245); heads and rotary base are keys of `model`."""

    _target_: str = "lunaris.model.attention.gqa.GQAFactory"
