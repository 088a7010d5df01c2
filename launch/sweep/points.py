"""The points of a sweep: composed and checked together, then frozen in one folder each."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lunaris.config.compose import Composer
from lunaris.config.identity import identity
from lunaris.config.overruled import overruled
from lunaris.config.run_names import point_name
from lunaris.config.schema.logger import WANDB_TAG_LENGTH, WandbLoggerConfig
from lunaris.config.schema.root import Config
from lunaris.continuation.checks import check_start
from lunaris.errors import UserError
from lunaris.launch.sweep.removed import note_removed
from lunaris.runs.create import create, refuse_other_config, take_world_size
from lunaris.runs.facts import checkpoint_folders, is_complete, step_of
from lunaris.runs.provenance import composed_with
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.status import has_trained, last_line
from lunaris.runs.sweep_manifest import ManifestPoint, read_points, write_points

# A sweep of more points prints that it checks them, because that takes seconds.
_MANY = 20


@dataclass(frozen=True)
class Point:
    """One point of a sweep, composed and checked; `dir` is the folder of its run."""

    name: str
    overrides: list[str]
    cfg: Config
    dir: Path

    @property
    def done(self) -> bool:
        """Whether its run has trained as far as `cfg` says.

        `Sweep.plan` refuses a folder with another run.
        """
        if has_trained(self.dir, self.cfg):
            return True
        # It was to pause, and has been trained further since, by a later rung say. At that step
        # itself its evaluation may be missing.
        saved = filter(is_complete, checkpoint_folders(RunDir(self.dir).checkpoints))
        end = self.cfg.trainer.stop_at
        return end is not None and max(map(step_of, saved), default=0) > end

    def check_waits(self, why: str) -> None:
        """Raise UserError where the launcher returns before a point has ended. why: it must not."""
        launch: Any = self.cfg.launch
        if hasattr(launch, "dry_run") and (launch.dry_run or not launch.wait):
            raise UserError(
                f"launch.wait={str(launch.wait).lower()}, launch.dry_run="
                f"{str(launch.dry_run).lower()}: {why}; it needs launch.wait=true and "
                "launch.dry_run=false"
            )


@dataclass
class Outcome:
    """How a point ended: `state` as in status.json, and its best validation loss (nats)."""

    point: Point
    state: str
    val_loss: float | None = None
    error: str = ""
    log: Path | None = None


@dataclass
class Sweep:
    """A sweep: its folder, the command that asked for it, and how its points ended.

    shared: the overrides that all points have; the others of a point make its name. warned: the
    lines that were printed of defaults, and of experiments that win over an option. zipped: what
    each `--zip` names. complete: whether all points are submitted together, so that others of the
    manifest are removed ones. more_follows: whether points that pause will train on.
    """

    dir: Path
    command: str
    shared: set[str]
    composer: Composer = field(default_factory=partial(Composer, of_sweep=True))
    outcomes: list[Outcome] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    zipped: Sequence[str] = ()
    complete: bool = False
    more_follows: bool = False

    @property
    def name(self) -> str:
        return self.dir.name

    def plan(self, job_overrides: Sequence[Sequence[str]]) -> list[Point]:
        """Compose and check every point; write nothing.

        Raises UserError naming the point when one cannot work, or when its folder holds a run of
        another config.
        """
        points: dict[str, Point] = {}
        for overrides in job_overrides:
            point = self._compose(list(overrides))
            refuse_other_config(RunDir(point.dir), point.cfg)
            check_start(point.cfg)
            before = points.setdefault(point.name, point)
            if before is not point and identity(before.cfg) != identity(point.cfg):
                raise UserError(
                    f"point {point.name}: two points of the sweep have this name, "
                    f"{' '.join(before.overrides)} and {' '.join(point.overrides)}; give "
                    "name= another value for each"
                )
        lines = [f"warning: {text}" for text in overruled(self.composer, job_overrides)]
        for line in [*self.composer.defaults_lines(job_overrides), *lines]:
            # A sweep may be planned in several parts.
            if line not in self.warned:
                self.warned.add(line)
                print(line, file=sys.stderr)
        _refuse_equal(list(points.values()))
        return list(points.values())

    def frozen_points(self) -> list[Point]:
        """Return the points of the manifest that have a folder."""
        dirs = [(row, self.dir / row.dir) for row in read_points(self.dir) or []]
        return [
            Point(row.name, row.overrides, RunDir(path).read_config(), path)
            for row, path in dirs
            if RunDir(path).config_path.is_file()
        ]

    def freeze(self, points: list[Point], active: Sequence[Point] = ()) -> None:
        """Write the sweep's manifest and the folder of every point that is not done.

        active: points that have a job, whose folders stay as the job finds them.
        """
        for point in points:
            if not point.done and point not in active:
                with composed_with(self.composer.record(point.overrides)):
                    create(point.cfg, self.command, point.overrides)
        self.record(points)
        if self.complete:
            for line in note_removed(self.dir, [point.name for point in points]):
                print(line, flush=True)

    def record(self, points: list[Point], job_ids: dict[str, str] | None = None) -> None:
        """Write points to the sweep's manifest. job_ids: by name, of the points that were sent."""
        ids = job_ids or {}
        rows = [
            ManifestPoint(p.name, p.overrides, p.name, ids.get(p.name), identity(p.cfg))
            for p in points
        ]
        write_points(self.dir, self.command, rows)

    def name_of(self, overrides: Sequence[str]) -> str:
        """Return the name of the point with these overrides."""
        return point_name([text for text in overrides if text not in self.shared])

    def command_of(self, point: Point) -> str:
        """Return the command that trains a point again, as a run of its own."""
        own = [
            text for text in point.overrides if text.partition("=")[0] not in ("name", "out_dir")
        ]
        return shlex.join(["lunaris", "train", *self.composer.source.flags(), *own])

    def _compose(self, overrides: list[str]) -> Point:
        name = self.name_of(overrides)
        try:
            cfg: Config = self.composer.compose(overrides)
        except UserError as error:
            about = "" if str(error).startswith(name) else f"point {name}: "
            raise UserError(f"{about}{error}") from error
        take_world_size(cfg)
        cfg.name = name
        cfg.out_dir = str(self.dir / name)
        for logger in cfg.logger.values():
            if isinstance(logger, WandbLoggerConfig):
                self._describe(logger, overrides)
        return Point(name, overrides, cfg, self.dir / name)

    def _describe(self, logger: WandbLoggerConfig, overrides: list[str]) -> None:
        """Tell W&B that a run is a point of this sweep, where no key or variable says otherwise."""
        if logger.group is None and not os.environ.get("WANDB_RUN_GROUP"):
            logger.group = self.name
        if logger.job_type is None and not os.environ.get("WANDB_JOB_TYPE"):
            logger.job_type = "sweep"
        if not os.environ.get("WANDB_TAGS"):
            own = [text.lstrip("+") for text in overrides if text not in self.shared]
            logger.tags = [*logger.tags, *(text for text in own if len(text) <= WANDB_TAG_LENGTH)]


def _refuse_equal(points: list[Point]) -> None:
    by_config: dict[str, Point] = {}
    for point in points:
        # A name that is swept asks for a run of its own.
        named = [text for text in point.overrides if text.startswith("name=")]
        config = f"{named} {replace(point.cfg, name='', out_dir='')}"
        before = by_config.setdefault(config, point)
        if before is not point:
            raise UserError(
                f"points {before.name} and {point.name}: two points of the sweep have the same "
                "config, so both would train the same run; leave one out"
            )


class PointLauncher(Protocol):
    """Runs or sends the checked points of a sweep."""

    def submit(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Freeze the points, run or send those that are not done; return an outcome for each."""


def submit_points(
    sweep: Sweep, job_overrides: Sequence[Sequence[str]], launcher: PointLauncher
) -> dict[str, Outcome]:
    """Check all points, then submit them; return their outcomes by name.

    Raises UserError, having written nothing, when a point cannot work.
    """
    if len(job_overrides) > _MANY:
        (first,) = sweep.plan(job_overrides[:1])
        # A dry run prints scripts and nothing else.
        if not getattr(first.cfg.launch, "dry_run", False):
            print(f"checking {len(job_overrides)} points", flush=True)
    outcomes = launcher.submit(sweep, sweep.plan(job_overrides))
    sweep.outcomes += outcomes
    return {outcome.point.name: outcome for outcome in outcomes}


def outcome_of(point: Point) -> Outcome:
    """Return how a point ended, from the files in its folder."""
    status = RunDir(point.dir).read_status()
    state, error = str(status.get("state", "failed")), str(status.get("last_error") or "")
    if point.done and state not in FINISHED:
        # It was stopped, or failed, after the step that it was to pause at.
        state = "paused"
    logs = RunDir(point.dir).logs
    written = (logs / "rank_0.log", logs / "console.log")
    log = next((path for path in written if path.is_file() and path.stat().st_size), None)
    loss = status.get("best_val_loss")
    return Outcome(point, state, loss, error or last_line([log] if log else []), log)
