"""The runs below a folder as plain rows, for machines. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lunaris.runs.changes import read_changes
from lunaris.runs.discovery import FoundRun, find_runs
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import RunState, logs_of, resolve_states


def run_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each run below a folder. Raises UserError where there is no such folder."""
    found = find_runs(folder)
    states = resolve_states([run.path for run in found])
    return [run_row(run, state) for run, state in zip(found, states, strict=True)]


def run_row(run: FoundRun, state: RunState) -> dict[str, Any]:
    """Return what is known of a run; null where something is not."""
    status = state.status
    return {
        "name": run.name,
        "dir": str(run.path),
        "sweep": None if run.sweep is None else str(run.sweep),
        "overrides": run.overrides,
        "state": state.state,
        "remark": state.remark or None,
        "step": status.get("step", 0),
        "max_steps": status.get("max_steps"),
        "best_val_loss": status.get("best_val_loss"),
        "attempts": status.get("attempts", 0),
        "job_id": state.job_id,
        "changes": [
            {"step": change.step, "keys": change.keys, "command": change.command}
            for change in read_changes(run.path)
        ],
        "parents": RunDir(run.path).parents(),
        "logs": [str(log) for log in logs_of(run.path, status)],
    }
