"""The points of a sweep that its last command does not have any more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lunaris.runs.status import resolve_states
from lunaris.runs.sweep_manifest import ManifestPoint, read_points, set_removed


def note_removed(folder: Path, names: Sequence[str]) -> list[str]:
    """Note in the manifest which points are not among the `names` of a command; return lines.

    The lines name these points with their states, and how their jobs are cancelled.
    """
    removed = [point for point in read_points(folder) or [] if point.name not in names]
    set_removed(folder, [point.name for point in removed])
    return _lines(folder, removed) if removed else []


def _lines(folder: Path, removed: Sequence[ManifestPoint]) -> list[str]:
    states = resolve_states([folder / point.dir for point in removed])
    lines = [f"removed {len(removed)} points of {folder} that this command does not have"]
    for point, state in zip(removed, states, strict=True):
        job = f", job {state.job_id}" if state.active and state.job_id else ""
        lines.append(f"        {point.name}: {state.state}{job}")
    if any(state.active and state.job_id for state in states):
        command = shlex.join(["lunaris", "cancel", str(folder), "--removed"])
        lines.append(f"        `{command}` cancels their jobs")
    return lines
