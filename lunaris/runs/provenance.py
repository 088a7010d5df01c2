"""The origin of a run, kept in its provenance.json: command, versions, commit, machine."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("lunaris-codex", "torch", "numpy", "hydra-core", "omegaconf", "submitit", "tokenizers")


# What a defaults.yaml set in the config of the runs that are created now; None: not known.
_defaults: dict[str, Any] | None = None


@contextmanager
def composed_with(defaults: dict[str, Any]) -> Iterator[None]:
    """Record `defaults` in the provenance of the runs that are created in this context.

    They are what a `defaults.yaml` set: its `file` and its `keys`, or {} for nothing.
    """
    global _defaults
    before, _defaults = _defaults, defaults
    try:
        yield
    finally:
        _defaults = before


def collect(command: str, overrides: list[str]) -> dict[str, Any]:
    """Return the provenance of a run that this process launches with a command line."""
    return {
        "command": command,
        "overrides": list(overrides),
        "created": time.time(),
        "cwd": os.getcwd(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git(Path(__file__).resolve().parent),
        **({} if _defaults is None else {"defaults": _defaults}),
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Return the host, its platform and the SLURM job of this process."""
    slurm = {k: v for k, v in sorted(os.environ.items()) if re.match("SLURM_(JOB|.*ARRAY)", k)}
    return {"host": socket.gethostname(), "platform": platform.platform(), "slurm": slurm}


def update(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of a run that is launched again; replaced values go to `earlier`."""
    changed = {key: old[key] for key in new if key in old and old[key] != new[key]}
    merged = old | new
    if changed.keys() - {"created"}:
        merged["earlier"] = [*old.get("earlier", []), changed]
    return merged


@cache  # Seven look-ups for every point of a sweep.
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache  # The same for every point of a sweep.
def _git(folder: Path) -> dict[str, Any]:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
