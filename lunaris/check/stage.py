"""Runs a part of a check in processes of its own, so that none of them can take the others along.

No torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lunaris.runs.status import last_line

_LOOK_S = 0.1
_GRACE_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How the processes of a part ended. code: their exit code, None where time ran out."""

    code: int | None
    seconds: float
    log: Path

    def reason(self) -> str:
        """Return why they failed: the last line of their output."""
        if self.code is None:
            return f"did not end within {self.seconds:.0f} s"
        return last_line([self.log]) or f"exit code {self.code}"


def run_module(
    module: str,
    path: Path,
    timeout_s: float,
    watch: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Ended:
    """Run `python -m module path` with its output in `path`/logs/check.log, until it has ended.

    It and all that it started are killed when `timeout_s` seconds have passed, and when this
    process is interrupted. watch: called ten times a second.
    """
    log = path / "logs" / "check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - began < timeout_s:
                if watch is not None:
                    watch(process)
                time.sleep(_LOOK_S)
            code = process.poll()
        finally:
            _end(process)
    return Ended(code, time.monotonic() - began, log)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started, on Linux."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, where they have not ended."""
    for number, seconds in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        started = descendants(process.pid)
        if process.poll() is not None:
            return
        for pid in (process.pid, *started):
            try:
                # One that is stopped gets the signal only when it continues.
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
