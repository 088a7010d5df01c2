"""The schemas of the learning-rate schedules. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component, key


@dataclass
class ScheduleConfig(Component):
    """How the learning rate changes over the steps."""

    _group_ = "schedule"


@dataclass
class ConstantConfig(ScheduleConfig):
    """Linear warm-up, then a constant rate."""

    _target_: str = "lunaris.optim.schedule.Constant"
    # Steps in which the rate rises linearly from 0.
    warmup_steps: int = key(0, low=0)


@dataclass
class CosineConfig(ConstantConfig):
    """Linear warm-up, then half a cosine down to `min_lr_ratio` of the peak."""

    _target_: str = "lunaris.optim.schedule.Cosine"
    # The last rate, as a share of the peak.
    min_lr_ratio: float = key(0.1, low=0.0, high=1.0)


@dataclass
class WSDConfig(CosineConfig):
    """Warm-up, stable, decay: the last `decay_fraction` of the steps fall linearly."""

    _target_: str = "lunaris.optim.schedule.WSD"
    # Share of the steps in which the rate falls.
    decay_fraction: float = key(0.2, low=0.0, high=1.0)
