"""`lunaris resume`: continue a run, or the points of a sweep that are not done, as launched."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lunaris.config.cli import Flags, parse_flags
from lunaris.config.compose import Composer, Source
from lunaris.config.frozen import to_tree
from lunaris.config.identity import differing, identity
from lunaris.config.schema.root import Config
from lunaris.config.trust import add_flag, allow, allow_named, check_overrides, check_tree
from lunaris.config.validate import validate
from lunaris.errors import UserError, did_you_mean
from lunaris.runs.changes import read_changes
from lunaris.runs.create import create
from lunaris.runs.discovery import expected_runs, is_run, is_sweep
from lunaris.runs.run_dir import FINISHED, RunDir, not_a_run
from lunaris.runs.status import ACTIVE, STATES, RunState, refuse_unknown, resolve_states
from lunaris.runs.sweep_manifest import ManifestPoint, read_manifest

if TYPE_CHECKING:
    from lunaris.continuation.change import Continuation
    from lunaris.data.base import Data
    from lunaris.launch.sweep.points import Point, Sweep

# Which states go on where `--only` names none, and which it may name.
_UNDONE = tuple(state for state in STATES if state not in (*FINISHED, "unknown", *ACTIVE))
_NAMED = (*_UNDONE, "paused")
_TO_THE_END = "trainer.stop_at=null"


def main(argv: list[str]) -> int:
    """Start or send again what is not done; return the exit code, as `lunaris train` does."""
    args = _parser().parse_intermixed_args(argv)
    allow(args.trust)
    allow_named(args.overrides)
    folder = Path(args.dir)
    wanted = _states(args.only)
    skipped = _sequences(args.skip_sequences)
    if is_run(folder):
        given = {text.partition("=")[0].lstrip("+") for text in args.overrides}
        to_the_end = "paused" in wanted and "trainer.stop_at" not in given
        if to_the_end and _state_of(folder) == "paused":
            args.overrides.append(_TO_THE_END)
        if args.overrides or args.at is not None:
            return _change_run(folder, args, shlex.join(["lunaris", "resume", *argv]), skipped)
        return _resume_run(folder, wanted, skipped)
    if is_sweep(folder):
        others = [text for text in args.overrides if not _is_launch(text)]
        for given in (*others, *(["--at"] if args.at is not None else [])):
            raise UserError(
                f"{given}: goes with the folder of a run, and each point of {folder} is one; of a "
                "sweep, only keys of launch may change"
            )
        if skipped is not None:
            raise UserError(
                f"--skip-sequences {args.skip_sequences}: goes with the folder of a run, not of a "
                "sweep, whose points read their data in different orders"
            )
        return _resume_sweep(folder, wanted, args, shlex.join(["lunaris", "resume", *argv]))
    raise UserError(not_a_run(folder, " and not a sweep's"))


def _is_launch(override: str) -> bool:
    """Return whether an override chooses a launcher or one of its keys."""
    name = override.partition("=")[0].lstrip("+~")
    return name == "launch" or name.startswith("launch.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris resume",
        description="Continue a run from its newest checkpoint, or the points of a sweep that are "
        "not done. They run here or as SLURM jobs, as they were launched, with the config of the "
        "folder and the code of today. KEY=VALUE changes a run from its newest checkpoint on, as "
        "far as that does not change what its weights are; the change is recorded with its step. "
        "Of a sweep, keys of launch may change, such as the memory of points that ran out of it.",
        epilog="examples: lunaris resume runs/first trainer.max_steps=1200; "
        "lunaris resume runs/first --at 200 optimizer.learning_rate=1e-3; "
        "lunaris resume sweeps/first --only failed,timeout; "
        "lunaris resume sweeps/first --only out_of_memory launch.mem_gb=128",
    )
    parser.add_argument("dir", help="the folder of a run or a sweep")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the keys to change; of a sweep, those of launch",
    )
    parser.add_argument(
        "--at",
        type=int,
        metavar="STEP",
        help="of a run, go back to the checkpoint of this step; what came later is set aside",
    )
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder with more options")
    parser.add_argument(
        "--only",
        metavar="STATES",
        help=f"of a sweep, only the points in these states: {', '.join(_NAMED)}; those that "
        "paused train to their end",
    )
    parser.add_argument(
        "--skip-sequences",
        metavar="A-B",
        help="of a run, do not train on the sequences A to B of its data, as the message of a run "
        "that stopped at them names them",
    )
    add_flag(parser)
    return parser


def _sequences(text: str | None) -> tuple[int, int] | None:
    """Return the first and the last sequence of `--skip-sequences A-B`."""
    if text is None:
        return None
    first, dash, last = text.partition("-")
    numbers = first.isdecimal() and last.isdecimal() and len(text) < 40
    if not dash or not numbers or not int(first) <= int(last) < 2**62:
        raise UserError(f"--skip-sequences {text}: must be A-B, two sequences with A at most B")
    return int(first), int(last)


def _states(only: str | None) -> tuple[str, ...]:
    wanted = tuple(only.split(",")) if only else _UNDONE
    for state in wanted:
        if state not in _NAMED:
            raise UserError(
                f"--only {state}: allowed are {', '.join(_NAMED)}{did_you_mean(state, _NAMED)}"
            )
    return wanted


def _change_run(
    folder: Path, args: argparse.Namespace, command: str, skipped: tuple[int, int] | None
) -> int:
    """Change the config of a run, or take it back, and continue it."""
    from lunaris.commands.train import submit
    from lunaris.continuation.change import plan_change

    run_dir, source = RunDir(folder), Source(dir=args.config_dir)
    if os.environ.get("RANK", "0") == "0":
        _refuse_active(folder)
    cfg = _config_of(folder)
    plan = plan_change(run_dir, cfg, args.overrides, at=args.at, source=source, command=command)
    if plan.change is None or plan.change.data is None:
        _check_data(plan.cfg, folder, {})
    # Of the processes that torchrun started, rank 0 writes; a rehearsal writes nothing.
    if os.environ.get("RANK", "0") == "0" and not getattr(plan.cfg.launch, "dry_run", False):
        print("\n".join(plan.write()))
        if skipped is not None:
            run_dir.leave_out(*skipped)
    return submit(plan.cfg, run_dir.noted("command") or "", run_dir.noted("overrides") or [])


def _state_of(folder: Path) -> str:
    return str(RunDir(folder).read_status().get("state"))


def _refuse_active(folder: Path) -> RunState:
    """Return the state of a run; raise UserError if it is queued or running, or may be."""
    (state,) = resolve_states([folder])
    refuse_unknown([folder], [state])
    if state.active:
        where = f"as job {state.job_id}" if state.job_id else "here"
        raise UserError(f"{folder}: is already {state.state}, {where}")
    return state


def _resume_run(
    folder: Path, wanted: tuple[str, ...], skipped: tuple[int, int] | None = None
) -> int:
    from lunaris.commands.train import submit

    state = _refuse_active(folder)
    if state.state not in wanted:
        said = f"{state.state}; nothing to do"
        if state.state == "paused":
            longer = shlex.join(["lunaris", "resume", str(folder), _TO_THE_END])
            said = f"paused by trainer.stop_at; `{longer}` continues to the last step"
        print(f"{folder}: {said}")
        return 0
    run_dir = RunDir(folder)
    cfg = _config_of(folder)
    _check_data(cfg, folder, {})
    if skipped is not None:
        run_dir.leave_out(*skipped)
    return submit(cfg, run_dir.noted("command") or "", run_dir.noted("overrides") or [])


def _config_of(folder: Path) -> Config:
    """Return the checked config of a run's folder, which may have been moved."""
    cfg = RunDir(folder).read_config()
    cfg.out_dir = str(folder)
    try:
        validate(cfg, check_data=False)
    except UserError as error:
        raise UserError(f"{RunDir(folder).config_path}: {error}") from error
    return cfg


def _check_data(cfg: Config, folder: Path, checked: dict[str, Data]) -> None:
    """Check the data of a run before anything is written: it may have been moved or changed.

    checked: by their keys, the data that were built before; most points of a sweep share theirs.
    """
    from lunaris.config.instantiate import instantiate_component
    from lunaris.config.schema.data import PreparedDataConfig, ShardsDataConfig
    from lunaris.config.typed import to_plain
    from lunaris.data.prepare.build import make_ready
    from lunaris.runs.data_fingerprint import check_data_fingerprint

    if getattr(cfg.data, "dir", None) is None:
        return
    keys = cfg.data
    if isinstance(keys, ShardsDataConfig | PreparedDataConfig):
        keys = replace(keys, verify=False)  # The processes that train verify the shards.
    known = json.dumps(to_plain(keys), sort_keys=True)
    if known not in checked:
        data: Data = instantiate_component("data", keys)
        make_ready(data)
        checked[known] = data
    check_data_fingerprint(checked[known], RunDir(folder))


def _resume_sweep(
    folder: Path, wanted: tuple[str, ...], args: argparse.Namespace, given: str
) -> int:
    """Continue the points in the states `wanted`, with other keys of launch where args names them.

    given: the command that does so.
    """
    manifest = read_manifest(folder)
    found = expected_runs(folder)
    paths = [run.path for run in found]
    states = resolve_states(paths)
    refuse_unknown(paths, states)
    if manifest.removed:
        named = ", ".join(manifest.removed)
        print(f"left out, because the sweep's last command does not have them: {named}")
    by_name = {run.name: s.state for run, s in zip(found, states, strict=True)}
    chosen = {name for name, state in by_name.items() if state in wanted}
    paused = {name for name, state in by_name.items() if state == "paused"}
    if not chosen:
        further = f"; --only paused trains {len(paused)} to the end" if paused else ""
        print(f"{folder}: no point is {' or '.join(wanted)}; nothing to do{further}")
        return 0
    from lunaris.continuation.change import plan_change
    from lunaris.launch.sweep.points import Sweep

    source = Source(dir=args.config_dir)
    flags = parse_flags(shlex.split(manifest.command)[2:])
    check_overrides(flags.overrides, folder)
    composer = Composer(flags.source, of_sweep=True)
    sweep = Sweep(folder, manifest.command, set(flags.overrides), composer)
    rows = [row for row in manifest.points if row.name in chosen]
    points, plans = [], []
    checked: dict[str, Data] = {}
    for row in rows:
        try:
            point = _point(folder, row, flags, manifest.command, checked)
            changes = [*args.overrides, *([_TO_THE_END] if row.name in paused else [])]
            if changes:
                run_dir = RunDir(point.dir)
                plan = plan_change(run_dir, point.cfg, changes, source=source, command=given)
                plans.append(plan)
                point = replace(point, cfg=plan.cfg)
            points.append(point)
        except UserError as error:
            # The other points can be resumed without this one.
            print(f"error: {error}", file=sys.stderr)
    code = UserError.exit_code if len(points) < len(rows) else 0
    return code if not points else _submit(sweep, points, plans) or code


def _point(
    folder: Path, row: ManifestPoint, flags: Flags, command: str, checked: dict[str, Data]
) -> Point:
    """Return a point read from its folder, or composed again where its folder is gone."""
    from lunaris.launch.sweep.points import Point

    path = folder / row.dir
    cfg: Config
    if is_run(path):
        cfg = _config_of(path)
        _check_data(cfg, path, checked)
    else:
        check_overrides(row.overrides, folder)
        cfg = Composer(flags.source, of_sweep=True).compose(row.overrides)
        # The manifest also says where its options are read from.
        check_tree(to_tree(cfg), folder)
        cfg.name, cfg.out_dir = row.name, str(path)
    # Keys that only one version of the code has are left out.
    found = identity(cfg)
    # Nor does a key count that the point changed since.
    since = {key for change in read_changes(path) for key in change.keys}
    both = row.identity.keys() & found.keys() - since
    rows = differing({k: row.identity[k] for k in both}, {k: found[k] for k in both})
    if rows:
        raise UserError(
            f"{path}: its config is not that of the sweep's manifest. Differing keys:\n  "
            + "\n  ".join(rows)
        )
    create(cfg, command, row.overrides)
    return Point(row.name, row.overrides, cfg, path)


def _submit(sweep: Sweep, points: list[Point], plans: list[Continuation]) -> int:
    """Start or send the points; write their changes (`plans`) once nothing refuses them."""
    from lunaris.launch.sweep.progress import SweepProgress
    from lunaris.launch.sweep.run_points import run_points

    launch = points[0].cfg.launch
    if hasattr(launch, "cluster"):
        from lunaris.launch.slurm import wait_until_ended
        from lunaris.launch.sweep.slurm_array import check_points, send_points

        check_points(sweep, points)
        _write(plans)
        send_points(sweep, points)
        ended = wait_until_ended([point.dir for point in points]) if launch.wait else []
        return int(any(state.state not in FINISHED for state in ended))
    _write(plans)
    outcomes = run_points(points, SweepProgress(points))
    return int(any(outcome.state not in FINISHED for outcome in outcomes))


def _write(plans: list[Continuation]) -> None:
    for plan in plans:
        for line in plan.write():
            print(f"{plan.run_dir.path.name}: {line}")
