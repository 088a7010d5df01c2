"""Weights & Biases, fed by a separate process from the run's `metrics.jsonl`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lunaris.config.schema.root import Config
from lunaris.console import say
from lunaris.metrics.loggers import Logger
from lunaris.metrics.records import Row
from lunaris.metrics.wandb_feed import FeedState, read_state, start_state
from lunaris.runs.run_dir import RunDir

# A run that stops before its last step sends the rest when it continues, and its job may have
# little time to end.
_STOPPED_S = 5.0
_MOMENT_S = 3.0


class WandbLogger(Logger):
    """Logs to W&B; writes to an offline folder when the service cannot be reached.

    Whatever W&B does, training does not wait for it: `lunaris.metrics.wandb_feed` sends the rows of
    `metrics.jsonl` from another process, whose output is in `logs/wandb.log`.
    """

    def __init__(
        self, *, mode: str | None, init_timeout_s: float, finish_timeout_s: float, **keys: Any
    ) -> None:
        """keys: `project`, `entity`, `group`, `job_type` and `tags`; where they and `mode` are not
        set, W&B's environment variables count."""
        chosen = mode or os.environ.get("WANDB_MODE") or "online"
        self._mode = {"dryrun": "offline", "shared": "online"}.get(chosen, chosen)
        self._finish_timeout_s = finish_timeout_s
        self._keys = keys | {
            "mode": self._mode,
            "init_timeout_s": init_timeout_s,
            "finish_timeout_s": finish_timeout_s,
            "fallback": True,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._step, self._told = 0, False

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Start the process that feeds W&B. Raises OSError where it cannot be started."""
        self._dir, self._step, self._last = run_dir, step, cfg.trainer.end()
        if self._mode == "disabled":
            return
        start_state(run_dir, self._keys)
        self._process = start_feed(run_dir, self._keys | {"name": cfg.name}, subprocess.PIPE)

    def tick(self, step: int) -> None:
        self._step = step

    def log(self, row: Row) -> None:
        """Say once where the run is on W&B, or why it is offline; the row is in metrics.jsonl."""
        self._step = row["step"]
        state = None if self._told or self._process is None else read_state(self._dir)
        if state is not None and (state.mode or state.error):
            self._told = True
            if state.mode == "online":
                say(f"W&B: {state.url}")
            elif state.error and self._mode != "offline":
                say(f"W&B ({self._mode}) did not start: {state.error}; it is written offline")

    def finish(self) -> None:
        """Wait for W&B, at most `finish_timeout_s`, and say what it does not have."""
        if self._process is None:
            return
        stopped = self._step < self._last
        most_s = _STOPPED_S if stopped else self._finish_timeout_s
        end_feed(
            self._process,
            most_s,
            None if stopped else lambda: say(f"W&B: waiting for it, at most {most_s:g} s"),
        )
        self._conclude(read_state(self._dir), most_s)

    def _conclude(self, state: FeedState | None, waited_s: float) -> None:
        if state is not None and state.finished and state.mode == "online":
            return
        command = f"`lunaris wandb-sync {shlex.quote(str(self._dir.path))}` sends it"
        if self._mode == "offline" and state is not None and state.finished:
            say(f"W&B is offline; {command}")
        else:
            reason = (state and state.error) or f"no answer in {waited_s:g} s"
            say(f"W&B does not have all of this run ({reason}); {command}")


def start_feed(run_dir: RunDir, keys: dict[str, Any], stdin: int) -> subprocess.Popen[bytes]:
    """Start the process that feeds W&B, away from the terminal's signals."""
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lunaris.metrics.wandb_feed", str(run_dir.path)]
    # It is no worker of the run, whatever started this process.
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    with (run_dir.logs / "wandb.log").open("ab") as log:
        return subprocess.Popen(
            [*command, json.dumps(keys)],
            stdin=stdin,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )


def end_feed(
    process: subprocess.Popen[bytes], timeout_s: float, waiting: Callable[[], None] | None = None
) -> bool:
    """Ask the process to end and kill it after `timeout_s`; return whether W&B has every row.

    waiting: called once where it takes longer than a moment.
    """
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.write(b"\n")
            process.stdin.close()
    moment = min(_MOMENT_S, timeout_s)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(moment) == 0
    if waiting is not None:
        waiting()
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout_s - moment) == 0
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False
