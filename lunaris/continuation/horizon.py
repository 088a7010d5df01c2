"""What another number of steps, or another schedule, means for a run that has begun. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config


@dataclass(frozen=True)
class Horizon:
    """How the learning rate of a changed run follows on that of its steps so far.

    text: for the person. same_until: the steps that have the same rates before and after the
    change. decay_start: the step at which the decay of the old schedule began, where the run is in
    it and the change extends the stable part; None otherwise.
    """

    text: str
    same_until: int
    decay_start: int | None = None


def horizon(old: Config, new: Config, step: int) -> Horizon | None:
    """Compare the schedules of two configs over the first `step` steps; None where they are equal.

    A schedule with a `decay_start` (WSD) is stable up to that step, so that a longer run shares
    these steps with a shorter one.
    """
    if old.schedule == new.schedule and old.trainer.max_steps == new.trainer.max_steps:
        return None
    before, after = schedule_of(old), schedule_of(new)
    same = next((s for s in range(step) if before(s) != after(s)), step)
    name = new.schedule._target_.rpartition(".")[2].lower()
    steps = f"{new.trainer.max_steps} steps"
    if same == step:
        return Horizon(f"{name}: a run of {steps} has the same rates up to step {step}", same)
    start, later = decay_start(before), decay_start(after)
    if start is not None and later is not None and start <= same and later > start:
        text = (
            f"{name}: {steps} extend the stable part, which ended at step {start}; its decay now "
            f"begins at step {later}"
        )
        return Horizon(text, same, start)
    return Horizon(
        f"{name}: a run of {steps} has another curve from step {same} on; at step {step} the rate "
        f"goes from {before(step):.3g} to {after(step):.3g} of the peak",
        same,
    )


def schedule_of(cfg: Config) -> Any:
    """Return the schedule of a config: a function from a step to the factor of the peak rate."""
    return instantiate_component("schedule", cfg.schedule, max_steps=cfg.trainer.max_steps)


def decay_start(schedule: Any) -> int | None:
    """Return the step up to which a schedule is the same for every longer run, if it says so."""
    found = getattr(schedule, "decay_start", None)
    return found if isinstance(found, int) else None
