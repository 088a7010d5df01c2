"""Runs on this machine: in this process as one rank, or in several under torch's elastic agent."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from lunaris.config.schema.base import component_keys
from lunaris.config.schema.root import Config
from lunaris.console import Tee, phase
from lunaris.distributed.signals import StopSignal
from lunaris.errors import EXPECTED, Stopped
from lunaris.launch.process import set_up_process
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import refuse_active

if TYPE_CHECKING:
    from lunaris.run import RunResult


@dataclass(kw_only=True)
class Local:
    """Starts the processes of a run on this machine and waits for them."""

    collective_timeout_s: float = 120.0
    processes: int = 1
    max_restarts: int = 0
    # Read by sweeps alone (`lunaris.launch.sweep.places`).
    points_at_once: int | None = None

    @classmethod
    def of(cls, cfg: Config) -> Local:
        """Return the launcher that the `launch` group of a config describes."""
        return cls(**component_keys(cfg.launch))

    def submit(self, cfg: Config, command: str, overrides: list[str]) -> int:
        """Freeze the folder of a run and train it; return the exit code.

        Raises UserError while a job of the run is queued or running, and when the run trains in
        this process also Stopped after a signal.
        """
        refuse_active(Path(cfg.out_dir))
        return self.start(create(cfg, command, overrides).path)

    def start(self, path: Path) -> int:
        """Train the run in folder `path` by its frozen config; return the exit code."""
        if self.processes == 1:
            return exit_code_here(RunDir(path).read_config(), path)
        with StopSignal() as early:
            from lunaris.launch.elastic import run_group

            if early.received:
                RunDir(path).write_status(state="stopped")
                raise Stopped(f"by {early.received.name} at {path}; run the same command to start")
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(self.processes)))
        return run_group(path, self.processes, self.max_restarts, self.collective_timeout_s)


def threads_each(processes: int) -> int:
    """Return how many threads each of several processes takes: its share of the cores.

    More would slow down the others.
    """
    affine = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    return max(1, cores // processes)


def train_here(cfg: Config, path: Path) -> RunResult:
    """Train as this process of the run in folder `path` and return how the run ended.

    The output of the process and the traceback of the error that ends it are written to
    `logs/rank_K.log`; rank 0 prints to the console too. Raises what `lunaris.run.execute` raises.
    """
    rank = os.environ.get("RANK", "0")
    log_path = RunDir(path).logs / f"rank_{rank}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    send = _console_and if rank == "0" else output_to
    with log_path.open("a", buffering=1) as log, send(log), StopSignal():
        try:
            with phase("starting", log=False):
                from lunaris.run import execute

            return execute(cfg, path)
        except BaseException as error:
            from lunaris.distributed.heartbeat import record_failure

            record_failure(error)
            if isinstance(error, EXPECTED):
                print(f"{type(error).__name__}: {error}", file=log)
            else:
                # Who interrupts a run knows why it ends: the console needs no traceback.
                interrupted = isinstance(error, KeyboardInterrupt)
                traceback.print_exc(file=log if interrupted else sys.stderr)
            raise


def exit_code_here(cfg: Config, path: Path) -> int:
    """Train as `train_here` does and return the exit code. Raises the errors of `EXPECTED`.

    The process is one that only trains: it is set up for that.
    """
    set_up_process(cfg.trainer.device, RunDir(path).logs)
    try:
        train_here(cfg, path)
    except EXPECTED:
        raise
    except Exception:  # `train_here` has printed its traceback.
        return 1
    return 0


@contextmanager
def output_to(log: IO[Any]) -> Iterator[None]:
    """Send the output of this process, of its C++ code and of its children, to the file `log`."""
    saved = {}
    for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        saved[fd] = os.dup(fd)
        os.dup2(log.fileno(), fd)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, before in saved.items():
            os.dup2(before, fd)
            os.close(before)


@contextmanager
def _console_and(log: TextIO) -> Iterator[None]:
    out, err = Tee(sys.stdout, log), Tee(sys.stderr, log)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield
