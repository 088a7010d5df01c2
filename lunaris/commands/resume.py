"""`lunaris resume`: go on with a run, or with what a sweep has not done, as it was launched."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from lunaris.atomic_files import read_json
from lunaris.config.cli import Flags, parse_flags
from lunaris.config.compose import compose
from lunaris.config.identity import differing, identity
from lunaris.errors import UserError, did_you_mean
from lunaris.runs import status as jobs
from lunaris.runs.discovery import find, is_run, is_sweep
from lunaris.runs.run_dir import RunDir, create

HELP = "go on with a run, or with what a sweep has not done, as it was launched"

_TO_DO = tuple(state for state in jobs.STATES if state not in ("done", *jobs.ACTIVE))


def main(argv: list[str]) -> int:
    """Start or send again what is not done; return the exit code, as `lunaris train` does."""
    args = _parser().parse_args(argv)
    folder = Path(args.dir)
    wanted = _states(args.only)
    if is_run(folder):
        return _resume_run(folder, wanted)
    if is_sweep(folder):
        return _resume_sweep(folder, wanted)
    raise UserError(f"{folder}: not a run's folder and not a sweep's")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris resume",
        description="Go on with a run from its newest checkpoint, or with the points of a sweep "
        "that are not done: here, or as SLURM jobs, as they were launched. The code is that of "
        "today, the config that of the folder.",
        epilog="example: lunaris resume sweeps/first --only failed,timeout",
    )
    parser.add_argument("dir", help="the folder of a run or a sweep")
    parser.add_argument(
        "--only", metavar="STATES", help=f"of a sweep: only these of {', '.join(_TO_DO)}"
    )
    return parser


def _states(only: str | None) -> tuple[str, ...]:
    wanted = tuple(only.split(",")) if only else _TO_DO
    for state in wanted:
        if state not in _TO_DO:
            raise UserError(
                f"--only {state}: allowed are {', '.join(_TO_DO)}{did_you_mean(state, _TO_DO)}"
            )
    return wanted


def _resume_run(folder: Path, wanted: tuple[str, ...]) -> int:
    from lunaris.commands.train import submit

    (state,) = jobs.states([folder])
    if not _wanted(folder, state, wanted):
        return 0
    cfg: Any = RunDir(folder).read_config()
    # The folder may have been moved since.
    cfg.out_dir = str(folder)
    _hold(cfg, folder, {})
    first = read_json(folder / "provenance.json")
    return submit(cfg, first.get("command", ""), first.get("overrides", []))


def _hold(cfg: Any, folder: Path, looked_at: dict[str, Any]) -> None:
    """Look at the data before anything is written: it may have moved, or changed, since.

    looked_at: by its keys, what was looked at before; the points of a sweep mostly share one.
    """
    from omegaconf import OmegaConf

    from lunaris.config.instantiate import build
    from lunaris.data.prepare.build import make_ready
    from lunaris.runs.data_fingerprint import hold

    if cfg.data.get("dir") is None:
        return
    keys: Any = OmegaConf.to_container(cfg.data)
    if "verify" in keys:
        keys["verify"] = False  # Left to the processes that train.
    known = json.dumps(keys, sort_keys=True)
    if known not in looked_at:
        data = build("data._target_", keys.pop("_target_"), keys)
        make_ready(data)
        looked_at[known] = data
    hold(looked_at[known], RunDir(folder))


def _wanted(folder: Path, state: jobs.RunState, wanted: tuple[str, ...]) -> bool:
    if state.state in jobs.ACTIVE:
        where = f"as job {state.job_id}" if state.job_id else "here"
        raise UserError(f"{folder}: is {state.state} already, {where}")
    if state.state not in wanted:
        print(f"{folder}: {state.state}; nothing to do")
        return False
    return True


def _resume_sweep(folder: Path, wanted: tuple[str, ...]) -> int:
    listed = find(folder)
    states = jobs.states([run.path for run in listed])
    chosen = {run.name for run, s in zip(listed, states, strict=True) if s.state in wanted}
    if not chosen:
        print(f"{folder}: no point is {' or '.join(wanted)}; nothing to do")
        return 0
    from lunaris.launch.sweep.points import Sweep, read_manifest

    manifest = read_manifest(folder)
    command = manifest["command"]
    flags = parse_flags(shlex.split(command)[2:])
    sweep = Sweep(folder, command, set(flags.overrides), flags.source)
    rows = [row for row in manifest["points"] if row["name"] in chosen]
    points = []
    looked_at: dict[str, Any] = {}
    for row in rows:
        try:
            points.append(_point(folder, row, flags, command, looked_at))
        except UserError as error:
            # The others can do without it.
            print(f"error: {error}", file=sys.stderr)
    code = UserError.exit_code if len(points) < len(rows) else 0
    if not points:
        return code
    if "cluster" in points[0].cfg.launch:
        return _send(sweep, points) or code
    return _run_here(points) or code


def _point(
    folder: Path, row: dict[str, Any], flags: Flags, command: str, looked_at: dict[str, Any]
) -> Any:
    """Return a point from its folder; one whose folder is gone is composed again."""
    from lunaris.launch.sweep.points import Point

    path = folder / row["dir"]
    if is_run(path):
        cfg: Any = RunDir(path).read_config()
        cfg.out_dir = str(path)
        _hold(cfg, path, looked_at)
    else:
        cfg = compose(row["overrides"], source=flags.source)
        cfg.name, cfg.out_dir = row["name"], str(path)
    rows = differing(row["identity"], identity(cfg))
    if rows:
        raise UserError(
            f"{path}: not the config that the sweep's manifest holds. Differing keys:\n  "
            + "\n  ".join(rows)
        )
    create(cfg, command, row["overrides"])
    return Point(row["name"], row["overrides"], cfg, path)


def _send(sweep: Any, points: list[Any]) -> int:
    from lunaris.launch.slurm import wait_for
    from lunaris.launch.sweep.slurm_array import send_points

    send_points(sweep, points)
    if not points[0].cfg.launch.wait:
        return 0
    ended = wait_for([point.dir for point in points])
    return int(any(state.state != "done" for state in ended))


def _run_here(points: list[Any]) -> int:
    from lunaris.launch.sweep.sweeper import console, run_point

    outcomes = []
    for i, point in enumerate(points):
        label = f"[{i + 1}/{len(points)}] {point.name}"
        outcomes.append(run_point(point, console(label)))
    return int(any(outcome.state != "done" for outcome in outcomes))
