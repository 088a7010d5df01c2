"""`lunaris runs`: a table of runs and sweep points: state, step, validation loss, job."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from lunaris.runs.changes import read_changes
from lunaris.runs.discovery import FoundRun, find_runs
from lunaris.runs.rows import run_row
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import STATES, RunState, last_line, logs_of, resolve_states

_HEADS = ("run", "state", "step", "val loss", "job", "overrides")
_WIDEST_NAME = 48
# States that need no explanation below the table.
_FINE = ("done", "running", "stopped", "cancelled")


def main(argv: list[str]) -> int:
    """Print a table of all runs below a folder, and why some of them failed or wait."""
    args = _parser().parse_args(argv)
    found = find_runs(Path(args.dir))
    pairs = list(zip(found, resolve_states([run.path for run in found]), strict=True))
    if args.json:
        print(json.dumps([run_row(run, state) for run, state in pairs], indent=2))
        return 0
    width = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10_000
    tables = []
    for sweep, group in groupby(pairs, key=lambda pair: pair[0].sweep):
        tables.append(_table(sweep, list(group), width))
    print("\n\n".join(tables))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris runs",
        description="A table of runs and sweep points. States: " + ", ".join(STATES) + ".",
        epilog="example: lunaris runs sweeps/first",
    )
    parser.add_argument(
        "dir", nargs="?", default=".", help="a run, a sweep, or a folder of them (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


def _table(sweep: Path | None, pairs: list[tuple[FoundRun, RunState]], width: int) -> str:
    rows = [_HEADS] + [_row(run, state) for run, state in pairs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = []
    if sweep is not None:
        counts = Counter(state.state for _, state in pairs)
        shown = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
        lines.append(f"sweep {sweep}: {shown}")
    for row in rows:
        line = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True))
        lines.append(line.rstrip()[:width])
    for run, state in pairs:
        lines += [f"  {run.name}: {_in_words(parent)}" for parent in RunDir(run.path).parents()]
        lines += [
            f"  {run.name}: changed at step {change.step}: {change}"
            for change in read_changes(run.path)
        ]
        lines += _why(run, state)
    return "\n".join(lines)


def _row(run: FoundRun, state: RunState) -> tuple[str, ...]:
    status = state.status
    loss = status.get("best_val_loss")
    name = run.name if len(run.name) <= _WIDEST_NAME else run.name[: _WIDEST_NAME - 1] + "…"
    return (
        name,
        state.state,
        f"{status.get('step', 0)}/{status.get('max_steps', '?')}",
        f"{loss:.4f}" if isinstance(loss, int | float) else "-",
        state.job_id or "-",
        " ".join(run.overrides),
    )


def _in_words(parent: dict[str, Any]) -> str:
    step = parent.get("step")
    return f"{parent.get('kind')} {parent.get('dir')}" + (f" at step {step}" if step else "")


def _why(run: FoundRun, state: RunState) -> list[str]:
    if state.state in _FINE or (state.state == "queued" and not state.remark):
        return []
    if state.state == "queued":
        return [f"  {run.name}: waits ({state.remark})"]
    logs = logs_of(run.path, state.status)
    why = state.remark or last_line(logs)
    lines = [f"  {run.name}: {state.state}" + (f": {why}" if why else "")]
    return lines + [f"    log: {logs[0]}"] if logs else lines
