"""The files of a run's checkpoints: which are complete, intact, in the way. No torch.

A checkpoint is the folder `step_N`. `files.json`, written last, has the size and CRC-32 of every
other file. A name that begins with a dot is being written or removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lunaris.atomic_files import sync_folder
from lunaris.errors import RunFailed, UserError
from lunaris.runs.facts import checkpoint_folders, is_complete, step_of

T = TypeVar("T")

_CHUNK = 1 << 22
# A file that is not there is damage; other errors may pass.
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Seconds before each further try to read a file, after an error that may pass.
_WAITS = (0.2, 1.0, 3.0)
# Of a checkpoint that is to be written: room for its metadata, and for the other files of a run.
_SPARE = 16 * 2**20


class Unreadable(UserError):
    """The disk gives no answer for a file; whether it is intact is not known."""


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, newest first."""
    return [path for path in checkpoint_folders(folder) if is_complete(path)]


def find_corruption(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return how a checkpoint's files differ from their recorded sizes and checksums, or None.

    Checks every `parts`-th file, starting at `part`, so that processes share the reading. Raises
    Unreadable where reading fails several times over.
    """
    listed = path / "files.json"
    try:
        sums = json.loads(_retried(listed.read_bytes, listed))
    except (*_GONE, ValueError, RecursionError):
        return "files.json cannot be read"
    if not isinstance(sums, dict) or not sums:
        return "files.json lists no files"
    for name in sorted(sums)[part::parts]:
        try:
            found = sums_of(path / name)
        except _GONE as error:
            return f"{name}: {error.strerror}"
        if found != sums[name]:
            return f"{name}: size and checksum {found}, expected {sums[name]}"
    return None


def sums_of(path: Path) -> list[int]:
    """Return the size and the CRC-32 of a file. Raises Unreadable as `find_corruption` does."""

    def read() -> list[int]:
        crc = size = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
                size += len(chunk)
        return [size, crc]

    return _retried(read, path)


def newest(folder: Path, step: int | None = None) -> Path:
    """Return the newest intact checkpoint in `folder`, or that of `step`.

    Raises UserError when there is none.
    """
    for path in complete(folder):
        if step is None or step_of(path) == step:
            fault = find_corruption(path)
            if fault is None:
                return path
            warnings.warn(f"checkpoint {path} is damaged, skipped: {fault}", stacklevel=2)
    steps = ", ".join(str(step_of(path)) for path in complete(folder))
    wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{folder}: {wanted}" + (f"; its checkpoint steps: {steps}" if steps else ""))


def remove(path: Path) -> None:
    """Remove a checkpoint; a process killed meanwhile leaves no half of it under its name."""
    hidden = path.with_name(f".tmp-removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing or removing; the caller holds the run's lock."""
    for path in folder.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_damaged_aside(paths: list[Path]) -> None:
    """Rename damaged checkpoints to `damaged-step_N…`, so that nothing counts or removes them."""
    for path in paths:
        number, target = 1, path.with_name(f"damaged-{path.name}")
        while target.exists():
            number, target = number + 1, path.with_name(f"damaged-{path.name}.{number}")
        path.rename(target)
    if paths:
        sync_folder(paths[0].parent)


def require_room(folder: Path, size: int) -> None:
    """Raise OSError (ENOSPC) where the disk of `folder` has less room than `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: a checkpoint takes {size / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free",
        )


def full_disk(error: BaseException) -> bool:
    """Return whether an error says that the disk, or the user's part of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def save_failed(target: Path, error: BaseException) -> RunFailed:
    """Return the error of a checkpoint that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunFailed(
        f"{target}: the checkpoint cannot be written ({reason or type(error).__name__}); what was "
        "written of it is removed and the checkpoints before it are kept. Make room or lower "
        "checkpoint.keep_last, then start the run again; checkpoint.on_error=continue trains on"
    )


def _retried(read: Callable[[], T], path: Path) -> T:
    for wait in (*_WAITS, None):
        try:
            return read()
        except _GONE:
            raise
        except OSError as error:
            if wait is None:
                raise Unreadable(
                    f"{path}: cannot be read ({error.strerror}) after {len(_WAITS) + 1} tries; "
                    "nothing was changed. Start again when the disk answers, or remove the "
                    "checkpoint by hand to continue from the one before"
                ) from error
            time.sleep(wait)
    raise AssertionError
