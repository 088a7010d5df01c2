"""A new run from the frozen config of another. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunaris.config.change import changed
from lunaris.config.compose import Source
from lunaris.config.identity import every_key
from lunaris.config.overrides import quoted
from lunaris.config.run_names import run_name
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.runs.changes import Change, changed_keys
from lunaris.runs.discovery import find_runs, is_run, is_sweep
from lunaris.runs.facts import checkpoint_folders, is_complete, step_of
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import resolve_states

# What every fork has of its own.
_OF_THE_FOLDER = ("name", "out_dir")


@dataclass(frozen=True)
class Fork:
    """A run that is about to begin from another one.

    cfg: checked. parent: as provenance.json keeps it (`RunDir.parents`). change: how the config
    differs from that of the parent.
    """

    cfg: Config
    parent: dict[str, Any]
    change: Change

    def lines(self) -> list[str]:
        """Return what is printed before the run starts: its parent and the difference."""
        rows = [str(Change(0, {key: row}, {}, "")) for key, row in self.change.rows()]
        return [
            f"forked     from {self.parent['dir']} to {self.cfg.out_dir}",
            *(f"           {row}" for row in rows or ["the same config"]),
        ]


def plan_fork(
    folder: Path,
    overrides: list[str],
    source: Source | None = None,
    *,
    weights: bool = False,
    at: int | None = None,
) -> Fork:
    """Return the checked fork of the run in `folder`; write nothing.

    weights: start from those of its checkpoint of step `at`, or of its newest. Without a `name=`
    the fork is called after the parent and the overrides; its folder stands next to that of the
    parent, or in `runs` where the parent is a point of a sweep. Raises UserError for what is not a
    run, for wrong overrides, for a step without a checkpoint, and for the parent's own folder.
    """
    parent = RunDir(folder)
    cfg = parent.read_config()
    keys = [text.partition("=")[0].lstrip("+") for text in overrides]
    given = list(overrides)
    if "name" not in keys:
        given.append(f"name={quoted(_name(folder, overrides))}")
    step = _step(folder, at) if weights else None
    if step is not None:
        given.append(f"init_from={quoted(str(folder / 'checkpoints' / f'step_{step:08d}'))}")
    if "trainer.stop_at" not in keys:
        # Where its parent paused is no end of a run of its own.
        given.append("trainer.stop_at=null")
    new = changed(cfg, given, source)
    if "out_dir" not in keys:
        in_sweep = is_sweep(folder.absolute().parent)
        new.out_dir = str((Path("runs") if in_sweep else folder.parent) / str(new.name))
    if Path(new.out_dir).resolve() == folder.resolve():
        raise UserError(
            f"name={new.name}: is the run in {folder} itself; give the fork another name, or "
            "change this run by `lunaris resume`"
        )
    both = changed_keys(every_key(cfg), every_key(new))
    difference = {key: row for key, row in both.items() if key not in _OF_THE_FOLDER}
    facts: dict[str, Any] = {"kind": "forked from", "dir": str(folder), "step": step}
    return Fork(new, facts, Change(0, difference, {}, ""))


def _step(folder: Path, at: int | None) -> int:
    """Return the step of a run's checkpoint, by default of its newest; UserError without one."""
    steps = [step_of(path) for path in checkpoint_folders(folder / "checkpoints")]
    steps = [step for step in steps if is_complete(folder / "checkpoints" / f"step_{step:08d}")]
    if not steps or (at is not None and at not in steps):
        found = (
            f"its checkpoint steps: {', '.join(map(str, sorted(steps)))}"
            if steps
            else "it has none"
        )
        wanted = "--weights" if at is None else f"--at {at}"
        raise UserError(f"{wanted}: {folder} has no such checkpoint; {found}")
    return max(steps) if at is None else at


def best_point(folder: Path) -> Path:
    """Return the folder of the run below `folder` with the lowest validation loss.

    Raises UserError where none of them has one.
    """
    found = find_runs(folder)
    losses = [
        (state.status["best_val_loss"], run.path)
        for run, state in zip(found, resolve_states([run.path for run in found]), strict=True)
        if is_run(run.path) and isinstance(state.status.get("best_val_loss"), int | float)
    ]
    if not losses:
        raise UserError(f"--best: no run below {folder} has a validation loss yet")
    return min(losses)[1]


def _name(folder: Path, overrides: list[str]) -> str:
    own = run_name(overrides)
    return f"{folder.resolve().name}.fork" if own == "default" else f"{folder.resolve().name},{own}"
