"""The runs below a folder as plain rows, for machines. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lunaris.config.run_names import values_of
from lunaris.runs.changes import read_changes
from lunaris.runs.discovery import FoundRun, find_runs
from lunaris.runs.preparation import progress
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import RunState, logs_of, resolve_states

_FIRST_PART = 1 << 16  # Bytes of a metrics file's end that are read first.


def run_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each run below a folder, and for each folder of shards that jobs prepare.

    Raises UserError where there is no such folder.
    """
    found = find_runs(folder, preparations=True)
    states = resolve_states([run.path for run in found])
    return [run_row(run, state) for run, state in zip(found, states, strict=True)]


def run_row(run: FoundRun, state: RunState) -> dict[str, Any]:
    """Return what is known of a run; null where something is not.

    final_train_loss, final_val_loss: of the last rows that have them. duration_s: seconds for which
    its processes existed. tokens: read so far. failures: of its job since it was sent, as far as
    `launch.max_failures` counts them. excluded: the nodes that `launch.preflight` left out, and
    why. values: of its overrides, as text by key. prepared: of a folder of shards that jobs
    prepare, how many bytes of the input are `encoded` and `merged`, of how many (`total`, 0 where
    unknown).
    """
    status, run_dir = state.status, RunDir(run.path)
    last = last_values(run_dir.metrics_path, ("train/loss", "val/loss"))
    return {
        "name": run.name,
        "dir": str(run.path),
        "sweep": None if run.sweep is None else str(run.sweep),
        "overrides": run.overrides,
        "values": values_of(run.overrides),
        "state": state.state,
        # What has failed while other tasks of a preparation work on.
        "remark": state.remark or (run.prepares and status.get("last_error")) or None,
        "step": status.get("step", 0),
        "max_steps": status.get("max_steps"),
        "final_train_loss": last.get("train/loss"),
        "final_val_loss": last.get("val/loss"),
        "best_val_loss": status.get("best_val_loss"),
        "duration_s": run_dir.trained_s(active=state.active),
        "tokens": status.get("tokens"),
        "attempts": status.get("attempts", 0),
        "failures": status.get("failures", 0),
        "last_failure": status.get("last_failure"),
        "excluded": status.get("excluded", {}),
        "job_id": state.job_id,
        "changes": [
            {
                "step": change.step,
                "keys": change.keys,
                "command": change.command,
                "text": str(change),
            }
            for change in read_changes(run.path)
        ],
        "parents": run_dir.parents(),
        "prepared": asdict(progress(run.path, status)) if run.prepares else None,
        "logs": [str(log) for log in logs_of(run.path, status)],
    }


def last_values(path: Path, keys: Sequence[str]) -> dict[str, float]:
    """Return the last number that a metrics file has for each of `keys`.

    The file is read from its end, only as far as needed.
    """
    found: dict[str, float] = {}
    for row in _rows_backwards(path):
        for key in keys:
            if key not in found and isinstance(row.get(key), int | float):
                found[key] = row[key]
        if len(found) == len(keys):
            break
    return found


def _rows_backwards(path: Path) -> Iterator[dict[str, Any]]:
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        end, rest, size = file.seek(0, os.SEEK_END), b"", _FIRST_PART
        while end > 0:
            start = max(0, end - size)
            file.seek(start)
            rest = file.read(end - start) + rest
            end, size = start, 2 * size
            # The beginning of the first line may stand before `start`.
            rest, _, lines = rest.partition(b"\n") if start else (b"", b"", rest)
            for line in reversed(lines.splitlines()):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
