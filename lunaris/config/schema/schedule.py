"""The schemas of the learning-rate schedules. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component
from lunaris.config.schema.checks import within


@dataclass
class ScheduleConfig(Component):
    """How the learning rate changes over the steps."""


@dataclass
class ConstantConfig(ScheduleConfig):
    """Linear warm-up, then a constant rate."""

    _target_: str = "lunaris.optim.schedule.Constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        within("schedule.warmup_steps", self.warmup_steps, low=0)


@dataclass
class CosineConfig(ConstantConfig):
    """Linear warm-up, then half a cosine down to `min_lr_ratio` of the peak."""

    _target_: str = "lunaris.optim.schedule.Cosine"
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        within("schedule.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)


@dataclass
class WSDConfig(CosineConfig):
    """Warm-up, stable, decay: the last `decay_fraction` of the steps fall linearly."""

    _target_: str = "lunaris.optim.schedule.WSD"
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        within("schedule.decay_fraction", self.decay_fraction, 0.0, 1.0)
