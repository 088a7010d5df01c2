"""Runs on this machine: one process, or several under torch's elastic agent."""

from __future__ import annotations

import os
from pathlib import Path

from lunaris.config.schema.base import component_keys
from lunaris.config.schema.root import Config
from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped
from lunaris.launch.process import exit_code_here
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir


class Local:
    """Starts the processes of a run on this machine and waits for them."""

    def __init__(
        self, *, collective_timeout_s: float = 120.0, processes: int = 1, max_restarts: int = 0
    ) -> None:
        self._timeout_s = collective_timeout_s
        self._processes = processes
        self._max_restarts = max_restarts

    @classmethod
    def of(cls, cfg: Config) -> Local:
        """Return the launcher that the `launch` group of a config describes."""
        return cls(**component_keys(cfg.launch))

    def submit(self, cfg: Config, command: str, overrides: list[str]) -> int:
        """Freeze the folder of a run and train it; return the exit code.

        Raises UserError, and Stopped after a signal, when the run trains in this process.
        """
        return self.start(create(cfg, command, overrides).path)

    def start(self, path: Path) -> int:
        """Train the run in folder `path` by its frozen config; return the exit code."""
        if self._processes == 1:
            return exit_code_here(RunDir(path).read_config(), path)
        with StopSignal() as early:
            from lunaris.launch.elastic import run_group

            if early.received:
                RunDir(path).write_status(state="stopped")
                raise Stopped(f"by {early.received.name} at {path}; run the same command to start")
        # Each process gets its share of the cores: more threads would slow down the others.
        threads = max(1, (os.cpu_count() or 1) // self._processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        return run_group(path, self._processes, self._max_restarts, self._timeout_s)
