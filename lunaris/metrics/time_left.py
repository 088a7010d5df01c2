"""How long a run still takes, from the steps, evaluations and checkpoints that it has measured."""

from __future__ import annotations

from collections import deque

# Steps that must be measured before there is an estimate, and the last ones that it rests on.
_FEWEST, _MOST = 3, 100


class TimeLeft:
    """Measures the time between the ends of steps; all times are in seconds.

    The first step of a process is left out, because it allocates and compiles. The time by which a
    step with an evaluation or a checkpoint takes longer counts once for each that is still to come.
    """

    def __init__(
        self, max_steps: int, eval_interval: int | None, save_interval: int | None
    ) -> None:
        self._max = max_steps
        self._intervals = {"evaluation": eval_interval, "checkpoint": save_interval}
        self._steps: deque[float] = deque(maxlen=_MOST)
        # Of the last one of each kind.
        self._extra: dict[str, float] = {}
        self._at: float | None = None

    def step(self, now: float, extras: set[str]) -> None:
        """Count a step that ends at `now`; extras: what else happened since the step before it."""
        before, self._at = self._at, now
        if before is None:
            return
        seconds = now - before
        if not extras:
            self._steps.append(seconds)
            return
        over = seconds - (self._mean() or 0.0)
        # Of two the evaluation was measured alone before, at step 0 at the latest.
        if len(extras) > 1:
            over -= self._extra.get("evaluation", 0.0)
        name = "checkpoint" if "checkpoint" in extras else "evaluation"
        self._extra[name] = max(0.0, over)

    def evaluated(self, seconds: float) -> None:
        """Note an evaluation that took `seconds`; one after the first step is measured anyway."""
        if self._at is None:
            self._extra["evaluation"] = seconds

    def seconds(self, step: int) -> float | None:
        """Return how long the run takes after `step`, or None as long as too little is known."""
        mean = self._mean()
        if mean is None:
            return None
        left = (self._max - step) * mean
        for name, seconds in self._extra.items():
            left += self._count(self._intervals[name], step) * seconds
        return left

    def _count(self, interval: int | None, step: int) -> int:
        """Return how often something happens after `step`: at multiples, and at the last step."""
        if step >= self._max:
            return 0
        if interval is None:
            return 1
        return self._max // interval - step // interval + (self._max % interval != 0)

    def _mean(self) -> float | None:
        return sum(self._steps) / len(self._steps) if len(self._steps) >= _FEWEST else None


def in_words(seconds: float) -> str:
    """Return a time as "0:41", "1:04:10" or "2 d 3 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
