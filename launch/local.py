"""Runs on this machine: one process here, or several under torch's elastic agent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped, UserError
from lunaris.runs import run_dir as rundir


class Local:
    """Starts a run's processes on this machine and waits for them."""

    def __init__(
        self, *, collective_timeout_s: float = 120.0, processes: int = 1, max_restarts: int = 0
    ) -> None:
        self._timeout_s = collective_timeout_s
        self._processes = processes
        self._max_restarts = max_restarts

    @classmethod
    def of(cls, cfg: Any) -> Local:
        """Return the launcher that the `launch` group of a run's config describes."""
        return cls(**{key: value for key, value in cfg.launch.items() if key != "_target_"})

    def submit(self, cfg: Any, command: str, overrides: list[str]) -> int:
        """Freeze the run's folder and train; return the exit code.

        Raises UserError, and Stopped after a signal, as the run in this very process does.
        """
        return self.start(rundir.create(cfg, command, overrides).path)

    def start(self, path: Path) -> int:
        """Train the run in folder `path` as its config says; return the exit code."""
        if self._processes == 1:
            from lunaris.launch.worker import work

            try:
                work(rundir.RunDir(path).read_config(), path)
            except (UserError, Stopped):
                raise
            except Exception:  # Printed by `work`, with its traceback.
                return 1
            return 0
        with StopSignal() as early:
            from lunaris.launch.elastic import run_group

            if early.received:
                rundir.RunDir(path).write_status(state="stopped")
                raise Stopped(f"by {early.received.name} at {path}; the same command starts it")
        # Processes that share cores are slowed by each other's threads.
        threads = max(1, (os.cpu_count() or 1) // self._processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        return run_group(path, self._processes, self._max_restarts, self._timeout_s)
