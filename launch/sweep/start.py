"""A sweep from its command line to its summary.

Our sweeper and launchers take the straight way: parse, expand, check, freeze, submit. A sweeper or
launcher of Hydra's is run by `hydra.main`.
"""

from __future__ import annotations

import os
from typing import Any

from lunaris.config.cli import Flags
from lunaris.config.run_names import values_of
from lunaris.errors import UserError
from lunaris.launch.sweep.expand import PRODUCT, read_request
from lunaris.launch.sweep.halving import CHOICE as HALVING_CHOICE
from lunaris.launch.sweep.halving import HALVING, in_words, plan_rungs, run_rungs
from lunaris.launch.sweep.optuna_study import CHOICE, OPTUNA, require_plugin, study_overrides
from lunaris.launch.sweep.points import Outcome, Point, Sweep, submit_points
from lunaris.launch.sweep.run_points import point_launcher, shown_loss
from lunaris.runs.run_dir import RunDir
from lunaris.runs.show import show
from lunaris.runs.status import STATES
from lunaris.runs.table import Table, short_keys


def sweep(flags: Flags, command: str) -> int:
    """Run or send every point of a sweep; return 1 if any failed. Raises Stopped at a signal."""
    if "RANK" in os.environ:
        raise UserError("--multirun: not under torchrun; give launch.processes=N instead")
    request = read_request(flags, command)
    if any(text in flags.overrides for text in (CHOICE, f"+{CHOICE}")):
        # Without it, Hydra would say that there is no such option.
        require_plugin()
    swept = request.sweep()
    hydra = request.hydra_config(swept.composer)
    targets = [hydra.sweeper._target_, hydra.launcher._target_]
    if flags.zipped and targets[0] not in (PRODUCT, HALVING):
        raise UserError(
            f"--zip: goes with hydra/sweeper=lunaris, which runs every combination; {targets[0]} "
            "chooses the points itself"
        )
    launcher = point_launcher(targets[1])
    ours = launcher is not None and not hydra.callbacks
    if targets[0] == HALVING and not ours:
        raise UserError(
            f"{HALVING_CHOICE}: goes with the launchers of this package and without callbacks of "
            f"Hydra's; {targets[1]} does not pause a point"
        )
    if targets[0] in (PRODUCT, HALVING) and launcher is not None and ours:
        halving = hydra.sweeper if targets[0] == HALVING else None
        texts = request.expand(hydra.sweeper.params or {})
        if flags.dry_run:
            _list(swept, texts, halving)
            return 0
        swept.complete = True
        if halving is None:
            outcomes = list(submit_points(swept, texts, launcher).values())
        else:
            outcomes = run_rungs(swept, swept.plan(texts), launcher, halving)
    elif flags.dry_run:
        raise UserError(
            f"--dry-run: goes with the sweeper and launchers of this package; {targets[0]} and "
            f"{targets[1]} run the points that they choose"
        )
    else:
        # Imported here because it imports all of Hydra.
        from lunaris.launch.sweep.hydra_bridge import run_by_hydra

        extra = study_overrides(request, swept, hydra.sweeper) if targets[0] == OPTUNA else []
        # Of a point that was tried more than once, the last outcome counts.
        ended = run_by_hydra(request, swept, targets, extra)
        outcomes = list({outcome.point.name: outcome for outcome in ended}.values())
    print(summary(swept, outcomes))
    return int(any(outcome.state == "failed" for outcome in outcomes))


def _list(sweep: Sweep, job_overrides: list[list[str]], halving: Any) -> None:
    """Print the points of a sweep, and the rungs where `halving` is its sweeper's config."""
    points = sweep.plan(job_overrides)
    show([listed(sweep, points)])
    if halving is not None:
        print(f"\nhalving: {in_words(plan_rungs(points, halving))}")


def listed(sweep: Sweep, points: list[Point]) -> Table:
    """Return the table of a sweep's points: what differs between them, and what is there already.

    A point that has no folder yet is new.
    """
    values = [values_of([o for o in p.overrides if o not in sweep.shared]) for p in points]
    keys = [key for key in dict.fromkeys(k for each in values for k in each) if key != "name"]
    shown = list(short_keys(keys).values())
    title = f"sweep {sweep.dir}: {len(points)} points; --dry-run writes and sends nothing"
    made = Table(title, ["run", "state", "step", *shown], swept=shown)
    for point, each in zip(points, values, strict=True):
        status = RunDir(point.dir).read_status()
        step = f"{status.get('step', 0)}/{point.cfg.trainer.max_steps}"
        cells = [each.get(key, "-") for key in keys]
        made.rows.append([point.name, status.get("state", "new"), step, *cells])
    return made


def summary(sweep: Sweep, outcomes: list[Outcome]) -> str:
    """Return the last lines of a sweep: how many points ended how, the best, all that failed."""
    states = [outcome.state for outcome in outcomes]
    named = [state for state in (*STATES, "checked") if state in states]
    counts = ", ".join(f"{states.count(state)} {state}" for state in named)
    lines = ["", f"sweep {sweep.dir}: {counts or 'no points'}"]
    losses = [o for o in outcomes if o.state == "done" and o.val_loss is not None]
    if losses:
        best = min(losses, key=lambda o: o.val_loss or 0.0)
        lines.append(f"best: {best.point.name}, {shown_loss(best)} ({best.point.dir})")
        lines.append(f"      {sweep.command_of(best.point)}")
    for outcome in outcomes:
        if outcome.state == "failed":
            lines.append(f"failed: {outcome.point.name}: {outcome.error}")
            lines.append(f"        log: {outcome.log or outcome.point.dir}")
    return "\n".join(lines)
