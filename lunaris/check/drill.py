"""A drill: one process of a run is stopped, and the others have to name it and end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lunaris.check.item import FAIL, OK, Item, skipped
from lunaris.check.stage import descendants, run_module
from lunaris.config.schema.root import Config
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir

# Seconds after which a silent process is given up in the drill; a run waits longer.
TIMEOUT_S = 10.0
_NAMED = re.compile(r"rank 1 has sent no heartbeat|the furthest behind: rank 1\b")
_STEP = 2
_STEPS = 10_000
# Seconds that the run and its end may take.
_LEAST_S = 3 * TIMEOUT_S


def hang_drill(cfg: Config, folder: Path, left_s: float) -> Item:
    """Stop the process of rank 1 in the middle of a run; return whether the run names it."""
    processes = cfg.launch.world_size()
    if processes == 1:
        return skipped("hang drill", "needs two processes; give launch.processes=2")
    if not list(Path("/proc/self/task").glob("*/children")):
        return skipped("hang drill", "needs a /proc that lists children, as on Linux")
    path = folder / "drill"
    if left_s < _LEAST_S:
        return skipped("hang drill", "no time is left; give --seconds")
    # It comes to its end only where nobody ends it.
    trainer = replace(cfg.trainer, max_steps=max(_STEPS, cfg.trainer.max_steps), stop_at=_STEPS)
    launch = replace(cfg.launch, collective_timeout_s=TIMEOUT_S)
    create(
        replace(cfg, name="drill", out_dir=str(path), trainer=trainer, launch=launch),
        "lunaris check", [],
    )  # fmt: skip
    stopped: list[int] = []

    def stop_rank_1(process: subprocess.Popen[bytes]) -> None:
        if not stopped and RunDir(path).read_status().get("step", 0) >= _STEP:
            for pid in descendants(process.pid):
                if _rank(pid) == "1":
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
                        stopped.append(pid)

    ended = run_module("lunaris.launch.worker", path, left_s, watch=stop_rank_1)
    if not stopped and ended.code is None:
        return skipped("hang drill", f"the run {ended.reason()}; give --seconds")
    if not stopped:
        return Item("hang drill", FAIL, f"no run to stop: {ended.reason()}")
    logs = [log.read_text(errors="replace") for log in (path / "logs").glob("*.log")]
    figures = {"seconds": ended.seconds, "timeout_s": TIMEOUT_S}
    if ended.code is None:
        return Item("hang drill", FAIL, f"the run did not end: {ended.reason()}", figures)
    if not any(map(_NAMED.search, logs)):
        return Item("hang drill", FAIL, f"rank 1 was not named: {ended.reason()}", figures)
    text = f"rank 1, stopped in a step, was named and the run ended (limit {TIMEOUT_S:g} s)"
    return Item("hang drill", OK, text, figures)


def _rank(pid: int) -> str | None:
    """Return the rank that the environment of a process names."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [text[5:].decode() for text in environment if text.startswith(b"RANK=")]
    return found[0] if found else None
