"""The recorded changes of a run's config: `changes.jsonl` in its folder, a row for each step.

A row is written before config.yaml. So the config of the last row is the one with which the run
continues, also where config.yaml was not written any more. No torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lunaris.atomic_files import write_durably

NAME = "changes.jsonl"


@dataclass(frozen=True)
class Change:
    """What changed in a run's config after its step `step`.

    keys: dotted key → {"old": value, "new": value}; one that only the other config has is absent.
    config: the content of config.yaml from then on. data: each source's digest where other data
    follows. time: in seconds since the epoch.
    """

    step: int
    keys: dict[str, dict[str, Any]]
    config: dict[str, Any]
    command: str
    data: dict[str, str] | None = None
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        shown = (f"{key}: {_shown(row, 'old')} → {_shown(row, 'new')}" for key, row in self.rows())
        return ", ".join(shown)

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the changed keys; of a class that was replaced, only its path."""
        replaced = [key.removesuffix("_target_") for key in self.keys if key.endswith("._target_")]
        return [
            (key, row)
            for key, row in self.keys.items()
            if len(row) == 2 or not key.startswith(tuple(replaced))
        ]


def read_changes(folder: Path) -> list[Change]:
    """Return the changes of the run in `folder` in order, without rows that cannot be read."""
    try:
        lines = (folder / NAME).read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [change for change in map(_parse, lines) if change is not None]


def record_change(folder: Path, change: Change) -> None:
    """Write a change of the run in `folder`, which continues from the change's step.

    Changes of later steps, which the run leaves, and those of the same step become one with it.
    """
    _write(folder, _joined([*read_changes(folder), change], change.step))


def begin_changes_at(folder: Path, step: int) -> None:
    """Let the changes that were to begin after `step` begin at it: the run continues from there."""
    changes = read_changes(folder)
    if any(change.step > step for change in changes):
        _write(folder, _joined(changes, step))


def since(changes: Sequence[Change], step: int) -> list[Change]:
    """Return the changes that began at `step` or later."""
    return [change for change in changes if change.step >= step]


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys in which two flat configs differ, as `Change.keys` holds them."""
    absent = object()
    found = {}
    for key in [*new, *(key for key in old if key not in new)]:
        pair = {"old": old.get(key, absent), "new": new.get(key, absent)}
        if pair["old"] != pair["new"]:
            found[key] = {name: value for name, value in pair.items() if value is not absent}
    return found


def _joined(changes: Sequence[Change], step: int) -> list[Change]:
    kept = [change for change in changes if change.step < step]
    later = since(changes, step)
    if not later:
        return kept
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for change in later:
        for key, row in change.keys.items():
            if key not in old and key not in new and "old" in row:
                old[key] = row["old"]
            new.pop(key, None)
            if "new" in row:
                new[key] = row["new"]
    data = [change.data for change in later if change.data is not None]
    last = replace(
        later[-1], step=step, keys=changed_keys(old, new), data=data[-1] if data else None
    )
    return [*kept, last] if last.keys else kept


def _write(folder: Path, changes: list[Change]) -> None:
    path = folder / NAME
    before = path.read_bytes() if path.is_file() else b""
    if None in map(_parse, before.decode(errors="replace").splitlines()):
        write_durably(folder / f"{NAME}.damaged", before)
    lines = "".join(json.dumps(asdict(change)) + "\n" for change in changes)
    write_durably(folder / NAME, lines.encode())


def _parse(line: str) -> Change | None:
    try:
        row = json.loads(line)
        change = Change(**{key: row[key] for key in Change.__dataclass_fields__})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    fits = type(change.step) is int and isinstance(change.config, dict)
    keys = change.keys
    return change if fits and isinstance(keys, dict) and all(map(_is_pair, keys.values())) else None


def _is_pair(row: object) -> bool:
    return isinstance(row, dict) and bool(row) and row.keys() <= {"old", "new"}


def _shown(row: dict[str, Any], name: str) -> str:
    return str(row[name]) if name in row else "(absent)"
