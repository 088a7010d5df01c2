"""Atomic file replacement, and the one lock file that every shared folder uses. No torch."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one rename: a reader sees the old content or the new.

    The rename survives a power cut once `sync_folder` has synced the folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def remove_temporaries(folder: Path) -> None:
    """Remove what a process left in a folder that was killed while it replaced a file there.

    The caller holds the folder's lock: no other process writes into it.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink()


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file and return once the change survives a power cut."""
    replace_file(path, content)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_lock(path: Path, *, wait: bool = True) -> TextIO:
    """Lock the file `path`, which is created, for this process; return it, open for appending.

    Closing it releases the lock, as does the end of the process, however it ends. With
    `wait=False`, raises `FileInUse` with the file's content while another process has the lock.
    """
    file = path.open("a+", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        with file:
            file.seek(0)
            raise FileInUse(file.read().strip()) from error
    return file


class FileInUse(RuntimeError):
    """Another process holds a file's lock; the message is the file's content."""


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, or {} where there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
