"""Runs a part of a check in processes of its own, so that none of them can take the others along.

No torch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_LOOK_S = 0.1
_GRACE_S = 5.0
# The line of a log that says what went wrong: of an exception, of ours, or of a group.
_FAULT = re.compile(
    r"^(error: |rank \d+ failed: |(\w+\.)*\w*(Error|Exception|Interrupt)\b).*", re.M
)


@dataclass(frozen=True)
class Ended:
    """How the processes of a part ended. code: their exit code, None where time ran out."""

    code: int | None
    seconds: float
    log: Path

    def reason(self) -> str:
        """Return why they failed: what killed them, or the last error in their output."""
        if self.code is None:
            return f"did not end within {self.seconds:.0f} s"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        found = [match[0] for match in _FAULT.finditer(text)]
        return found[-1].removeprefix("error: ") if found else f"exit code {self.code}"


def run_module(
    module: str,
    path: Path,
    timeout_s: float,
    watch: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Ended:
    """Run `python -m module path` with its output in `path`/logs/check.log, until it has ended.

    It and all that it started are killed when `timeout_s` seconds have passed, and when this
    process is interrupted. Their temporary files and caches are below `path`. watch: called ten
    times a second.
    """
    log = path / "logs" / "check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    temporary = path / "tmp"
    temporary.mkdir(exist_ok=True)
    places = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    began = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | dict.fromkeys(places, str(temporary)),
        )
        started: set[int] = set()
        try:
            while process.poll() is None and time.monotonic() - began < timeout_s:
                started.update(descendants(process.pid))
                if watch is not None:
                    watch(process)
                time.sleep(_LOOK_S)
            code = process.poll()
        finally:
            with _uninterrupted():
                _end(process, started, str(path))
    return Ended(code, time.monotonic() - began, log)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started, on Linux."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # It has just ended.
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def _end(process: subprocess.Popen[bytes], started: set[int], path: str) -> None:
    """End a process and all that it started for the folder `path`, where they have not ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        started.update(descendants(process.pid))
        alive = [pid for pid in started if _works_on(pid, path)]
        if process.poll() is not None and not alive:
            return
        for pid in (process.pid, *alive):
            with suppress(ProcessLookupError):
                # One that is stopped gets the signal only when it continues.
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and (
            process.poll() is None or any(_works_on(pid, path) for pid in alive)
        ):
            time.sleep(_LOOK_S)


def _works_on(pid: int, path: str) -> bool:
    """Return whether a process lives whose command line or environment names a folder."""
    try:
        texts = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    except OSError:
        return False
    return any(path.encode() in text for text in texts)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let another Ctrl-C not keep this process from ending what it started."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
