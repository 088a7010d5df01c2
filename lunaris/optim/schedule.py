"""Learning-rate schedules as pure functions of the step: they have no state to save.

Each is called with the index of the step about to be taken (0 for the first) and returns the
multiplier of every group's peak rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A learning-rate schedule; its class also takes `max_steps`, the steps of the run.

    One with an attribute `decay_start` says up to which step every longer run has the same rates.
    """

    def __call__(self, step: int) -> float:
        """Return the multiplier of every group's peak rate for step `step`, counted from 0."""


@dataclass(frozen=True)
class Constant:
    """Rises linearly to 1 over `warmup_steps`, then stays."""

    max_steps: int
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Return the multiplier in [0, 1] for step `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    def after_warmup(self, step: int) -> float:
        """Return the multiplier past the warm-up."""
        return 1.0


@dataclass(frozen=True)
class Cosine(Constant):
    """Half a cosine from 1 to `min_lr_ratio` after the warm-up (arXiv 1608.03983, eq. 5)."""

    min_lr_ratio: float = 0.1

    def after_warmup(self, step: int) -> float:
        span = max(1, self.max_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (
            1 + math.cos(math.pi * progress)
        )


@dataclass(frozen=True)
class WSD(Cosine):
    """Warm-up, stable, decay: 1, then linear to `min_lr_ratio` (arXiv 2404.06395, section 4)."""

    decay_fraction: float = 0.2

    @property
    def decay_start(self) -> int:
        """The step up to which every longer run has the same rates; its checkpoint is kept."""
        return self.max_steps - self._decay_steps

    @property
    def _decay_steps(self) -> int:
        return round(self.max_steps * self.decay_fraction)

    def after_warmup(self, step: int) -> float:
        decay_steps = self._decay_steps
        left = self.max_steps - step
        if left >= decay_steps:
            return 1.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * max(0, left) / max(1, decay_steps)
