"""The runs and sweeps below a folder, found by their files. No torch, no Hydra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lunaris.atomic_files import read_json
from lunaris.errors import UserError

_MANIFEST = "manifest.json"
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Listed:
    """A run's folder, or a sweep's point that may have no folder (any more)."""

    path: Path
    name: str
    # As given on the command line; of a point those that not all points of its sweep share.
    overrides: list[str]
    sweep: Path | None = None


def is_run(folder: Path) -> bool:
    """Say whether `folder` holds a run."""
    return (folder / _CONFIG).is_file()


def is_sweep(folder: Path) -> bool:
    """Say whether `folder` holds a sweep."""
    return _points(folder) is not None


def _points(folder: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a sweep's manifest, without those that cannot be read; None: no sweep."""
    rows = read_json(folder / _MANIFEST).get("points")
    if not isinstance(rows, list):
        return None
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and _are_texts([row.get("name"), row.get("dir")])
        and _are_texts(row.get("overrides"))
    ]


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def find(folder: Path) -> list[Listed]:
    """Return the run in `folder`, the points of the sweep, or all below it, sorted by path.

    Raises UserError when there are none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = list(_in(folder))
    if not found:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                found += _in(child)
                if child.name in ("runs", "sweeps"):
                    for grandchild in sorted(child.iterdir()):
                        found += _in(grandchild)
    if not found:
        raise UserError(f"{folder}: holds no runs and no sweeps")
    return found


def _in(folder: Path) -> Iterator[Listed]:
    if is_run(folder):
        overrides = read_json(folder / "provenance.json").get("overrides")
        yield Listed(folder, folder.name, overrides if _are_texts(overrides) else [])
    elif folder.is_dir() and (rows := _points(folder)) is not None:
        shared = set.intersection(*(set(row["overrides"]) for row in rows)) if rows else set()
        for row in rows:
            own = [text for text in row["overrides"] if len(rows) == 1 or text not in shared]
            yield Listed(folder / row["dir"], row["name"], own, folder)
