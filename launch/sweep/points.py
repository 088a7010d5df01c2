"""The points of a sweep: composed and checked together, then frozen into folders of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lunaris.atomic_files import file_lock, read_json, write_json
from lunaris.config.compose import Composer, Source
from lunaris.config.identity import differing, identity
from lunaris.config.run_names import point_name
from lunaris.errors import UserError
from lunaris.runs import run_dir as rundir
from lunaris.runs.run_dir import RunDir

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Point:
    """One point of a sweep, composed and checked; `dir` is its run's folder."""

    name: str
    overrides: list[str]
    cfg: Any
    dir: Path

    @property
    def done(self) -> bool:
        """Say whether this very run has ended well already."""
        run_dir = RunDir(self.dir)
        return run_dir.read_status().get("state") == "done" and not _other_config(self)


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
    """A sweep's folder, the command that asked for it, and what became of its points."""

    dir: Path
    command: str
    # The overrides that all points share; what else a point has names it.
    shared: set[str]
    source: Source = field(default_factory=Source)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.dir.name

    def plan(self, job_overrides: Sequence[Sequence[str]]) -> list[Point]:
        """Compose and check every point; write nothing.

        Raises UserError naming the point when one cannot work, or when its folder holds a run of
        another config.
        """
        composer = Composer(self.source)
        points: dict[str, Point] = {}
        for overrides in job_overrides:
            point = self._compose(composer, list(overrides))
            rows = _other_config(point)
            if rows:
                raise UserError(
                    f"{point.dir}: holds a run of another config; choose another `name=`, or "
                    "remove the folder. Differing keys:\n  " + "\n  ".join(rows)
                )
            before = points.setdefault(point.name, point)
            if differing(identity(before.cfg), identity(point.cfg)):
                raise UserError(
                    f"point {point.name}: two points of the sweep have this name, "
                    f"{' '.join(before.overrides)} and {' '.join(point.overrides)}; give "
                    "name= another value for each"
                )
        return list(points.values())

    def points(self) -> list[Point]:
        """Return the points that the sweep's manifest holds, read from their folders."""
        rows = read_json(self.dir / MANIFEST).get("points", [])
        dirs = [(row, self.dir / row["dir"]) for row in rows]
        return [
            Point(row["name"], row["overrides"], RunDir(path).read_config(), path)
            for row, path in dirs
            if RunDir(path).config_path.is_file()
        ]

    def freeze(self, points: list[Point]) -> None:
        """Write the sweep's manifest and the folder of every point that is not done."""
        for point in points:
            if not point.done:
                rundir.create(point.cfg, self.command, point.overrides)
        write_manifest(self, points)

    def name_of(self, overrides: list[str]) -> str:
        """Return the name of the point with these overrides."""
        return point_name([text for text in overrides if text not in self.shared])

    def _compose(self, composer: Composer, overrides: list[str]) -> Point:
        name = self.name_of(overrides)
        try:
            cfg = composer.compose(overrides)
        except UserError as error:
            about = "" if str(error).startswith(name) else f"point {name}: "
            raise UserError(f"{about}{error}") from error
        if "RANK" in os.environ and "processes" in cfg.launch:
            # A task of a job of another launcher: what `rundir.create` will freeze.
            cfg.launch.processes = int(os.environ["WORLD_SIZE"])
        cfg.name = name
        cfg.out_dir = str(self.dir / name)
        if cfg.logger.get("group", "") is None:
            cfg.logger.group = self.name
        return Point(name, overrides, cfg, self.dir / name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a sweep's manifest. Raises UserError where there is none."""
    manifest = read_json(folder / MANIFEST)
    if "points" not in manifest:
        raise UserError(f"{folder}: not a sweep's folder (it holds no {MANIFEST})")
    return manifest


def write_manifest(
    sweep: Sweep, points: list[Point], job_ids: dict[str, str] | None = None
) -> None:
    """Add the points to `manifest.json`, or replace those of the same name.

    The manifest holds name, command, created (seconds since the epoch) and points; of each its
    name, overrides, dir (relative to the manifest), job_id and identity (the keys that decide its
    numbers). job_ids: of the points that were sent, by name.
    """
    path = sweep.dir / MANIFEST
    sweep.dir.mkdir(parents=True, exist_ok=True)
    # The points of a sweep that another launcher started may come here at the same time.
    with file_lock(sweep.dir / ".manifest.lock"):
        _merge_manifest(path, sweep, points, job_ids or {})


def _merge_manifest(path: Path, sweep: Sweep, points: list[Point], job_ids: dict[str, str]) -> None:
    old = read_json(path)
    rows = {row["name"]: row for row in old.get("points", [])}
    for point in points:
        rows[point.name] = {
            "name": point.name,
            "overrides": point.overrides,
            "dir": point.name,
            "job_id": job_ids.get(point.name, rows.get(point.name, {}).get("job_id")),
            "identity": identity(point.cfg),
        }
    write_json(
        path,
        {
            "name": sweep.name,
            "command": sweep.command,
            "created": old.get("created", time.time()),
            "points": list(rows.values()),
        },
    )


def outcome_of(point: Point) -> Outcome:
    """Read from a point's folder how it ended."""
    status = RunDir(point.dir).read_status()
    state, error = str(status.get("state", "failed")), str(status.get("last_error") or "")
    logs = RunDir(point.dir).logs
    log = next((p for p in (logs / "rank_0.log", logs / "console.log") if _has_text(p)), None)
    loss = status.get("best_val_loss")
    return Outcome(point, state, loss, error or _last_line(log), log)


def _other_config(point: Point) -> list[str]:
    run_dir = RunDir(point.dir)
    if not run_dir.config_path.is_file():
        return []
    return differing(identity(run_dir.read_config()), identity(point.cfg))


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _last_line(path: Path | None) -> str:
    lines = path.read_text(errors="replace").split("\n") if path is not None else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
