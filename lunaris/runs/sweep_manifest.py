"""The manifest.json of a sweep: its command and its points. No torch, no Hydra."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from lunaris.atomic_files import file_lock, read_json, write_json
from lunaris.config.migrations import VERSION, VERSION_KEY, migrate_identity
from lunaris.errors import UserError

_NAME = "manifest.json"


@dataclass(frozen=True)
class ManifestPoint:
    """A point of a sweep.

    dir: the folder of its run, relative to the manifest. job_id: None before it is sent.
    identity: the keys that decide its numbers (`lunaris.config.identity.identity`).
    """

    name: str
    overrides: list[str]
    dir: str
    job_id: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    created: in seconds since the epoch. removed: the names of the points that the last command
    did not have any more.
    """

    name: str
    command: str
    created: float
    points: list[ManifestPoint]
    removed: list[str] = field(default_factory=list)


def read_points(folder: Path) -> list[ManifestPoint] | None:
    """Return the points of the sweep in `folder`, or None where it holds no sweep.

    Rows that cannot be read are left out.
    """
    rows = read_json(folder / _NAME).get("points")
    if not isinstance(rows, list):
        return None
    return [_point_of(row) for row in rows if _is_point(row)]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the sweep in `folder`. Raises UserError where there is none."""
    points = read_points(folder)
    if points is None:
        raise UserError(f"{folder}: not a sweep's folder (it holds no {_NAME})")
    content = read_json(folder / _NAME)
    return Manifest(
        str(content.get("name", folder.name)),
        str(content.get("command", "")),
        content.get("created", 0.0),
        points,
        content["removed"] if are_texts(content.get("removed")) else [],
    )


def write_points(folder: Path, command: str, points: Iterable[ManifestPoint]) -> None:
    """Add points to the manifest of the sweep in `folder`, or replace those of the same name.

    A point without a job id keeps the one that the manifest has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may write the points of one sweep, each its own.
    with file_lock(folder / ".manifest.lock"):
        old = read_json(folder / _NAME)
        rows = {row["name"]: row for row in old.get("points", [])}
        for point in points:
            job_id = point.job_id or rows.get(point.name, {}).get("job_id")
            rows[point.name] = asdict(point) | {"job_id": job_id, VERSION_KEY: VERSION}
        content = {
            "name": folder.name,
            "command": command,
            "created": old.get("created", time.time()),
            "points": list(rows.values()),
            "removed": old.get("removed", []),
        }
        write_json(folder / _NAME, content)


def set_removed(folder: Path, names: list[str]) -> None:
    """Note in the manifest of the sweep in `folder` which points its last command does not have."""
    with file_lock(folder / ".manifest.lock"):
        write_json(folder / _NAME, read_json(folder / _NAME) | {"removed": names})


def _point_of(row: dict[str, Any]) -> ManifestPoint:
    known = ManifestPoint.__dataclass_fields__
    point = ManifestPoint(**{key: row[key] for key in row if key in known})
    if isinstance(point.identity, dict):
        migrate_identity(point.identity, row.get(VERSION_KEY, 1))
    return point


def _is_point(row: object) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(row, dict)
        and are_texts([row.get("name"), row.get("dir")])
        and are_texts(row.get("overrides"))
        and type(row.get(VERSION_KEY, 1)) is int
    )


def are_texts(value: object) -> TypeGuard[list[str]]:
    """Return whether a value read from JSON is a list of strings."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
