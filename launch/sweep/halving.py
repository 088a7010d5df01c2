"""Successive halving (arXiv 1502.07943): all points train a little, and the best of them train on.

A rung is a step at which the points pause (`trainer.stop_at`) and are compared by their validation
losses there. One of `factor` trains on to the next rung, `factor` times as far; the others stay
paused, with a checkpoint. All that decides is in the folders of the points, so that the command
given again continues the sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lunaris.config.hydra_internals import PLUGIN_PACKAGE
from lunaris.errors import Stopped, UserError
from lunaris.launch.sweep.points import Outcome, Point, PointLauncher, Sweep
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import resolve_states

# The sweeper, as `hydra.sweeper._target_` names it.
HALVING = f"{PLUGIN_PACKAGE}.Halving"
CHOICE = "hydra/sweeper=halving"


@dataclass(frozen=True)
class Rung:
    """So many points that train up to a step."""

    points: int
    step: int


def plan_rungs(points: list[Point], sweeper: Any) -> list[Rung]:
    """Return the rungs of a sweep, the last one at `trainer.max_steps`; write nothing.

    sweeper: `hydra.sweeper`, with `factor` and `first_step`. A rung is a step at which the points
    evaluate anyway: a multiple of `trainer.eval_interval`. Raises UserError where the points
    cannot be compared.
    """
    factor, first = sweeper.factor, sweeper.first_step
    if not isinstance(factor, int) or factor < 2:
        raise UserError(f"hydra.sweeper.factor={factor}: must be a whole number of at least 2")
    last, interval = _compared(points)
    points[0].check_waits(f"{CHOICE} chooses by the losses of points that have paused")
    if first is None:
        # As many rungs as it takes until one point is left.
        first = max(1, last // factor ** _divisions(len(points), factor))
    elif not isinstance(first, int) or not 1 <= first < last:
        raise UserError(
            f"hydra.sweeper.first_step={first}: must be at least 1 and less than "
            f"trainer.max_steps={last}"
        )
    rungs, left = [], len(points)
    step = math.ceil(first / interval) * interval
    while step < last and left > 1:
        rungs.append(Rung(left, step))
        left = math.ceil(left / factor)
        first *= factor
        step = max(step + interval, math.ceil(first / interval) * interval)
    if not rungs and left > 1:
        raise UserError(
            f"{CHOICE}: from hydra.sweeper.first_step={first} on there is no evaluation before the "
            f"last of {last} steps; lower it, or trainer.eval_interval={interval}"
        )
    return [*rungs, Rung(left, last)]


def in_words(rungs: list[Rung]) -> str:
    """Return how far how many points train."""
    return ", ".join(
        f"{rung.points} point{'s' * (rung.points > 1)} to step {rung.step:,}" for rung in rungs
    )


def run_rungs(
    sweep: Sweep, points: list[Point], launcher: PointLauncher, sweeper: Any
) -> list[Outcome]:
    """Train the points from rung to rung; return how each ended: done, paused or failed.

    A point that fails before a rung is out. Raises UserError, having written nothing, where the
    points cannot be compared or the launcher does not wait for them; Stopped where a point has not
    come to a rung for another reason; and what the launcher raises.
    """
    rungs = plan_rungs(points, sweeper)
    ended: dict[str, Outcome] = {}
    print(f"halving {in_words(rungs)}", flush=True)
    for number, rung in enumerate(rungs, 1):
        last = number == len(rungs)
        at = [_until(point, None if last else rung.step) for point in points]
        if not last:
            _check_losses(at)
        here = in_words([Rung(len(points), rung.step)])
        print(f"rung    {number} of {len(rungs)}: {here}", flush=True)
        # What is left out later is not removed from the sweep.
        sweep.complete, sweep.more_follows = number == 1, not last
        outcomes = launcher.submit(sweep, at)
        ended |= {outcome.point.name: outcome for outcome in outcomes}
        if last:
            break
        _raise_if_missing(outcomes)
        points = _best([outcome.point for outcome in outcomes], rungs[number])
        if not points:
            print("no point has a validation loss to go on with", flush=True)
            break
    return list(ended.values())


def _check_losses(points: list[Point]) -> None:
    """Raise UserError for a point that has trained past a rung without an evaluation there."""
    for point in points:
        if point.done and _loss_at(point) is None:
            raise UserError(
                f"{point.dir}: has trained past step {point.cfg.trainer.end()} and has no "
                "validation loss there to be compared by, as it was evaluated at other steps; "
                "give trainer.eval_interval and hydra.sweeper.first_step as before, or another "
                "`name=`"
            )


def _raise_if_missing(outcomes: Sequence[Outcome]) -> None:
    """Raise Stopped where a point has neither come to its rung nor failed.

    It was preempted or cancelled, say. Who trains on is decided when all are there.
    """
    left = [outcome for outcome in outcomes if not outcome.point.done]
    states = [state.state for state in resolve_states([o.point.dir for o in left])]
    missing = [
        f"{outcome.point.dir} ({state})"
        for outcome, state in zip(left, states, strict=True)
        if state not in ("failed", "out_of_memory")
    ]
    if not missing:
        return
    for outcome, state in zip(left, states, strict=True):
        if state in ("failed", "out_of_memory"):
            print(f"{state}: {outcome.point.name}: {outcome.error}", flush=True)
    step = outcomes[0].point.cfg.trainer.end()
    raise Stopped(f"before step {step} at {', '.join(missing)}; run the same command to continue")


def _divisions(points: int, factor: int) -> int:
    """Return how many times `points` is divided by `factor`, rounded up, until 1 is left."""
    count = 0
    while points > 1:
        points, count = math.ceil(points / factor), count + 1
    return count


def _compared(points: list[Point]) -> tuple[int, int]:
    """Return the last step of all points, and the steps between their evaluations."""
    found = []
    for key in ("max_steps", "eval_interval"):
        values = list(dict.fromkeys(getattr(point.cfg.trainer, key) for point in points))
        if len(values) > 1:
            shown = ",".join("null" if value is None else str(value) for value in values)
            raise UserError(
                f"trainer.{key}={shown}: {CHOICE} compares the points at the same steps; it needs "
                "one value for all"
            )
        found += values
    last, interval = found
    if interval is None or interval >= last:
        raise UserError(
            f"trainer.eval_interval={'null' if interval is None else interval}: {CHOICE} compares "
            f"validation losses before the last step; give less than trainer.max_steps={last}"
        )
    for point in points:
        if point.cfg.trainer.stop_at is not None:
            raise UserError(
                f"trainer.stop_at={point.cfg.trainer.stop_at}: {CHOICE} chooses the steps at which "
                "points pause; leave it out"
            )
    return last, interval


def _until(point: Point, step: int | None) -> Point:
    """Return a point that pauses at a step, or trains to its end."""
    trainer = replace(point.cfg.trainer, stop_at=step)
    return replace(point, cfg=replace(point.cfg, trainer=trainer))


def _best(points: Sequence[Point], rung: Rung) -> list[Point]:
    """Return the points that train on to a rung, in their order, and print which and why.

    A point that failed before it could pause is out.
    """
    found = {point.name: _loss_at(point) for point in points if point.done}
    losses = {name: loss for name, loss in found.items() if loss is not None}
    finite = [point for point in points if math.isfinite(losses.get(point.name, math.nan))]
    ranked = sorted(finite, key=lambda point: losses[point.name])  # Stable, where two are equal.
    kept = {point.name for point in ranked[: rung.points]}
    for point in ranked:
        said = "trains on" if point.name in kept else "stays"
        print(f"        {losses[point.name]:.4f}  {point.name}: {said}", flush=True)
    for point in points:
        if point not in finite:
            print(f"        -       {point.name}: out, without a validation loss here", flush=True)
    return [point for point in finite if point.name in kept]


def _loss_at(point: Point) -> float | None:
    """Return the validation loss of a point where it paused (nats), or None without one."""
    step, found = point.cfg.trainer.end(), None
    for row in read_rows(RunDir(point.dir).metrics_path):
        if row.get("step") == step and row.get("val/loss") is not None:
            found = row["val/loss"]
    return found
