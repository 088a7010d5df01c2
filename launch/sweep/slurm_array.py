"""Sweeps sent to SLURM: every point checked before any is sent, then one job array."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from lunaris.errors import UserError
from lunaris.launch.slurm import Slurm, wait_for
from lunaris.launch.slurm_task import export_ranks
from lunaris.launch.sweep.points import Outcome, Point, Sweep, outcome_of, write_manifest
from lunaris.launch.sweep.sweeper import PointLauncher, returned
from lunaris.runs import status as jobs
from lunaris.runs.run_dir import RunDir


class SlurmArray(PointLauncher):
    """Hydra's launcher of `launch=slurm`: sends the points and returns while they wait.

    With `launch.wait=true` it returns once all have ended, each with its best validation loss, so
    that sweepers which choose the next points by that work.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all points, send them as one array, return how each stands."""
        if not self._sweep.plan(job_overrides[:1])[0].cfg.launch.dry_run:
            return super().launch(job_overrides, initial_job_idx)
        points = self._sweep.plan(job_overrides)
        folder = self._sweep.dir.absolute()
        for launcher, group in by_launch(points):
            print(launcher.script(
                self._sweep.name, folder / "logs" / "slurm", folder / "code" / "SNAPSHOT",
                points=len(group) if len(group) > 1 else None,
            ))  # fmt: skip
        return [returned(Outcome(point, "checked")) for point in points]

    def run(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Send the points that are neither done nor under way."""
        states = jobs.states([point.dir for point in points])
        idle = [
            point
            for point, state in zip(points, states, strict=True)
            if state.state != "done" and not (state.state in jobs.ACTIVE and state.job_id)
        ]
        send_points(sweep, idle)
        if points[0].cfg.launch.wait:
            ended = wait_for([point.dir for point in points])
            return [_outcome(p, s.state, s.remark) for p, s in zip(points, ended, strict=True)]
        return [_outcome(p, s.state) for p, s in zip(points, _after_sending(points), strict=True)]


def send_points(sweep: Sweep, points: list[Point]) -> None:
    """Send the points, whose folders are frozen, and write their jobs into the manifest.

    One array, or one for each set of resources where the points differ in `launch`.
    """
    if not points:
        print(f"sweep   {sweep.dir}: no point to send")
        return
    for launcher, group in by_launch(points):
        folder = sweep.dir.absolute()
        ids = launcher.send([p.dir.absolute() for p in group], folder=folder, name=sweep.name)
        write_manifest(sweep, group, dict(zip((p.name for p in group), ids, strict=True)))
        shown = ids[0] if len(ids) == 1 else ids[0].partition("_")[0]
        one_job = len(ids) == 1 or launcher.keys.cluster == "local"
        print(f"sent    {'job' if one_job else 'job array'} {shown} ({len(ids)} points)")
    print(f"sweep   {sweep.dir}\nstate   lunaris runs {sweep.dir}", flush=True)


def train_in_job(sweep: Sweep, overrides: list[str]) -> float | None:
    """Train one point as a task of a job of hydra-submitit-launcher; return the objective.

    That launcher starts this once for every task. All but one leave the folder alone.
    """
    export_ranks()
    (point,) = sweep.plan([overrides])
    if os.environ["RANK"] == "0":
        sweep.freeze([point])
    # The others meet rank 0 when the process group is made.
    from lunaris.launch.worker import work

    try:
        loss: float | None = work(point.cfg, point.dir).best_val_loss
    except UserError as error:
        # Nobody waits for this process who could write it down.
        RunDir(point.dir).write_status(state="failed", last_error=str(error))
        raise
    return loss


def by_launch(points: list[Point]) -> list[tuple[Slurm, list[Point]]]:
    """Return the points in groups that ask for the same resources, and each group's launcher."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(OmegaConf.to_yaml(point.cfg.launch, resolve=True), []).append(point)
    return [(Slurm.of(group[0].cfg), group) for group in groups.values()]


def _after_sending(points: list[Point]) -> list[jobs.RunState]:
    # From files: SLURM has just been asked, and says nothing new of a job that it just took.
    statuses: list[dict[str, Any]] = [RunDir(p.dir).read_status() for p in points]
    return [jobs.RunState(str(s.get("state", "missing")), s) for s in statuses]


def _outcome(point: Point, state: str, error: str = "") -> Outcome:
    read = outcome_of(point)
    if state in ("done", "queued", "running"):
        return Outcome(point, state, read.val_loss)
    log: Path | None = read.log
    return Outcome(point, "failed", None, read.error or error or state, log)
