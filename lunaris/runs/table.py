"""The tables of `lunaris runs`, as text in cells. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

from lunaris.config.run_names import unsaid_by
from lunaris.errors import UserError, did_you_mean
from lunaris.runs.seeds import SEED, by_seed, compared
from lunaris.runs.status import STATES, last_line

Row = dict[str, Any]

# States that need no explanation below the table.
_FINE = ("done", "running", "stopped", "paused")
# What a person may call a column, beside the keys of a row.
_SHORT = {
    "run": "name",
    "loss": "final_train_loss",
    "val_loss": "best_val_loss",
    "time": "duration_s",
    "job": "job_id",
}
_SORTED = (
    "name", "state", "step", "final_train_loss", "final_val_loss", "best_val_loss", "duration_s",
    "tokens", "attempts", "job_id",
)  # fmt: skip


@dataclass
class Table:
    """Runs of one sweep, or those of none.

    heads: the columns, of which `swept` are keys whose values differ between the points. wide: the
    columns that a narrow terminal leaves out, the first one first.
    """

    title: str
    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each sweep of some rows, and one for the runs between them.

    A sweep over seeds has another one, of the means over them. The last is of what jobs prepare.
    """
    runs = [row for row in rows if row["prepared"] is None]
    groups = [(sweep, list(group)) for sweep, group in groupby(runs, key=lambda row: row["sweep"])]
    made = [[_table(sweep, group), *_seed_tables(sweep, group)] for sweep, group in groups]
    prepared = [row for row in rows if row["prepared"] is not None]
    return [table for pair in made for table in pair] + (
        [_prepared_table(prepared)] if prepared else []
    )


def sort_rows(rows: Sequence[Row], key: str, *, reverse: bool = False) -> list[Row]:
    """Return the rows of each sweep sorted by a column or an override; those without it last.

    Raises UserError where no row knows the key.
    """
    found = sort_key(rows, key)

    def ordered(group: list[Row]) -> list[Row]:
        known = [row for row in group if found(row) is not None]
        known.sort(key=lambda row: _comparable(found(row)), reverse=reverse)
        return known + [row for row in group if found(row) is None]

    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["sweep"])]
    return [row for group in groups for row in ordered(group)]


def sort_key(rows: Sequence[Row], key: str) -> Callable[[Row], Any]:
    """Return the function that reads a column of a row. Raises UserError for an unknown one."""
    name = _SHORT.get(key, key)
    if name in _SORTED:
        return lambda row: row[name]
    overrides = {name for row in rows for name in row["values"]}
    if key in overrides:
        return lambda row: row["values"].get(key)
    known = [*_SHORT, *_SORTED, *sorted(overrides)]
    raise UserError(
        f"--sort {key}: no such column; there are {', '.join(known)}{did_you_mean(key, known)}"
    )


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the run of each sweep, and of those in none, with the lowest validation loss."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["sweep"])]
    with_loss = [[row for row in group if _is_number(row["best_val_loss"])] for group in groups]
    return [min(group, key=lambda row: row["best_val_loss"]) for group in with_loss if group]


def plain_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the cells of a CSV file: a row a run, a column an override."""
    heads = ["name", "dir", "sweep", *_SORTED[1:3], "max_steps", *_SORTED[3:]]
    keys = [key for key in dict.fromkeys(k for row in rows for k in row["values"]) if key != "name"]
    cells = [
        [*(row[name] for name in heads), *(row["values"].get(key) for key in keys)] for row in rows
    ]
    return [*heads, *keys], cells


def _table(sweep: str | None, rows: list[Row]) -> Table:
    keys = [] if sweep is None else list(dict.fromkeys(key for r in rows for key in r["values"]))
    shown = short_keys(keys)
    title = ""
    if sweep is not None:
        counts = Counter(row["state"] for row in rows)
        states = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
        title = f"sweep {sweep}: {states}"
    made = Table(title, ["run", "state", "step", "loss", "val loss", "time", "job"])
    made.swept = [*shown.values()]
    made.heads += made.swept if keys else ["overrides"]
    made.wide = ["job", "time", *([] if keys else ["overrides"])]
    for row in rows:
        cells = [
            row["name"],
            row["state"],
            f"{row['step']}/{row['max_steps'] or '?'}",
            _loss(row["final_train_loss"]),
            _loss(row["best_val_loss"]),
            "-" if row["duration_s"] is None else str(timedelta(seconds=round(row["duration_s"]))),
            row["job_id"] or "-",
        ]
        if keys:
            cells += [row["values"].get(key, "-") for key in keys]
        else:
            cells.append(" ".join(unsaid_by(row["name"], row["overrides"])))
        made.rows.append(cells)
        made.notes += _notes(row)
    return made


def _prepared_table(rows: list[Row]) -> Table:
    """Return the table of the folders of shards that jobs prepare."""
    made = Table("", ["shards", "state", "encoded", "merged", "input", "job"], wide=["job"])
    for row in rows:
        done = row["prepared"]
        total = done["total"]
        parts = [_share(done[name], total) for name in ("encoded", "merged")]
        size = _size(total) if total else "-"
        made.rows.append([row["name"], row["state"], *parts, size, row["job_id"] or "-"])
        made.notes += _notes(row)
    return made


def _share(done: int, total: int) -> str:
    """Return a part of a total in percent; without a total, what is done."""
    # Not 100 % before it is all.
    return f"{100 * done // total} %" if total else _size(done)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _seed_tables(sweep: str | None, rows: list[Row]) -> list[Table]:
    """Return the table of the means over the seeds, where points differ in nothing else."""
    if sweep is None or not any(SEED in row["values"] for row in rows):
        return []
    counted = zip(rows, compared([(row["state"], row["step"] or 0) for row in rows]), strict=True)
    groups = by_seed((row["values"], row["best_val_loss"]) for row, counts in counted if counts)
    if not groups:
        return []
    keys = list(dict.fromkeys(key for group in groups for key in group.values))
    shown = list(short_keys(keys).values())
    title = f"means of the best validation losses over the seeds of {sweep}"
    made = Table(title, [*shown, "seeds", "mean", "spread"], swept=shown)
    for group in groups:
        cells = [group.values.get(key, "-") for key in keys]
        made.rows.append([*cells, str(len(group.losses)), _loss(group.mean), _loss(group.spread)])
    return [made]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the key where another one ends alike."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: key.rpartition(".")[2] for key in keys}
    return {key: short[key] if last[short[key]] == 1 else key for key in keys}


def _notes(row: Row) -> list[str]:
    """Return where a run comes from, what was changed in it, and why it failed or waits."""
    name, state = row["name"], row["state"]
    lines = [f"  {name}: {_in_words(parent)}" for parent in row["parents"]]
    lines += [
        f"  {name}: changed at step {change['step']}: {change['text']}" for change in row["changes"]
    ]
    if row["failures"]:
        times = f"{row['failures']} time{'s' * (row['failures'] > 1)}"
        lines.append(f"  {name}: failed {times}; the last: {row['last_failure']}")
    lines += [f"  {name}: without node {node}: {why}" for node, why in row["excluded"].items()]
    fine = state in _FINE and not (row["prepared"] and row["remark"])
    quiet = state in ("queued", "cancelled") and not row["remark"]
    if fine or quiet:
        return lines
    if state == "queued":
        return [*lines, f"  {name}: waits ({row['remark']})"]
    why = row["remark"] or last_line([Path(log) for log in row["logs"]])
    lines.append(f"  {name}: {state}" + (f": {why}" if why else ""))
    return [*lines, f"    log: {row['logs'][0]}"] if row["logs"] else lines


def _in_words(parent: dict[str, Any]) -> str:
    step = parent.get("step")
    return f"{parent.get('kind')} {parent.get('dir')}" + (f" at step {step}" if step else "")


def _loss(value: object) -> str:
    return f"{value:.4f}" if _is_number(value) else "-"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _comparable(value: Any) -> tuple[bool, float, str]:
    """Numbers, also those that are written as text, by size and before other text."""
    try:
        return (False, float(value), "")
    except (TypeError, ValueError):
        return (True, 0.0, str(value))
