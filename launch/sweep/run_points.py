"""The points of a sweep on this machine: each in its own process, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lunaris.config.hydra_internals import PLUGIN_PACKAGE
from lunaris.distributed.signals import StopSignal, saving
from lunaris.errors import Stopped, UserError
from lunaris.launch.sweep.places import Places
from lunaris.launch.sweep.points import Outcome, Point, PointLauncher, Sweep, outcome_of
from lunaris.launch.sweep.progress import Silent, SweepProgress
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.status import ACTIVE

_POLL_S = 0.2
_LOCAL, _SLURM = f"{PLUGIN_PACKAGE}.LocalSweep", f"{PLUGIN_PACKAGE}.SlurmArray"


def point_launcher(target: str) -> PointLauncher | None:
    """Return our launcher that `hydra.launcher._target_` names, or None for one of Hydra's."""
    if target == _LOCAL:
        return LocalPoints()
    if target == _SLURM:
        # Imported here because it imports submitit.
        from lunaris.launch.sweep.slurm_array import SlurmPoints

        return SlurmPoints()
    return None


class LocalPoints:
    """Runs points here; a point that fails does not stop the others."""

    def submit(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Freeze the points and run those that are not done; return an outcome for each.

        Raises Stopped as `run_points` does.
        """
        sweep.freeze(points)
        # Of a sweeper that chooses points batch by batch, this is one batch.
        progress = SweepProgress(points, first=len(sweep.outcomes))
        return run_points(points, progress, more_follows=sweep.more_follows)


def run_points(
    points: Sequence[Point], progress: Silent, *, more_follows: bool = False
) -> list[Outcome]:
    """Train the points that are not done, each in its own process; return an outcome for each.

    As many run at a time as `Places` gives room. A point that fails or is killed makes room for the
    next one. The output of each process goes to the logs of its point. At a signal no further
    point starts, and every running one gets the signal, saves and ends. Raises Stopped, after all
    that run have ended, where a point was stopped or not started, and with `more_follows` after a
    signal that came when all had paused.
    """
    with progress, _Signals() as signals:
        return _Group(points, progress, signals, more_follows).run()


@dataclass
class _Worker:
    """The process of a running point; began: in seconds, of the monotonic clock."""

    point: Point
    process: subprocess.Popen[bytes]
    began: float


class _Signals(StopSignal):
    """Collects the signals, until they are taken to be forwarded."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[int] = []

    def take(self) -> list[int]:
        """Return the signals that arrived since the last call."""
        new, self._new = self._new, []
        return new

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        self._new.append(number)


class _Group:
    """The points of a sweep that wait, run and have ended."""

    def __init__(
        self, points: Sequence[Point], progress: Silent, signals: _Signals, more_follows: bool
    ) -> None:
        self._points, self._more_follows = points, more_follows
        self._progress, self._signals, self._places = progress, signals, Places()
        self._waiting, self._running = deque(points), list[_Worker]()
        self._ended: dict[str, Outcome] = {}

    def run(self) -> list[Outcome]:
        try:
            while True:
                self._start()
                if not self._running:
                    break
                time.sleep(_POLL_S)
                for number in self._signals.take():
                    for worker in self._running:
                        worker.process.send_signal(number)
                self._collect()
                self._progress.draw(self._note())
        finally:
            # Where this process fails, its workers save and end.
            for worker in self._running:
                worker.process.terminate()
            for worker in self._running:
                worker.process.wait()
        self._raise_if_stopped()
        return [self._ended[point.name] for point in self._points]

    def _start(self) -> None:
        """Start the next points, in their order, as long as there is room."""
        while self._waiting and self._signals.received is None:
            point = self._waiting[0]
            if point.done:
                outcome = self._ended[point.name] = outcome_of(point)
                self._progress.ended(point, f"already {_reached(outcome)}, {shown_loss(outcome)}")
            else:
                variables = self._places.take(point.name, point.cfg)
                if variables is None:
                    return
                self._running.append(_start_worker(point, variables))
                self._progress.began(point)
            self._waiting.popleft()

    def _collect(self) -> None:
        """Take the points whose processes have ended from those that run."""
        for worker in [w for w in self._running if w.process.poll() is not None]:
            self._running.remove(worker)
            point, seconds = worker.point, f"{time.monotonic() - worker.began:.0f} s"
            self._places.free(point.name)
            _record_exit(RunDir(point.dir), worker.process.returncode, self._signals.received)
            outcome = self._ended[point.name] = outcome_of(point)
            if outcome.state in FINISHED:
                self._progress.ended(
                    point, f"{_reached(outcome)} in {seconds}, {shown_loss(outcome)}"
                )
            else:
                self._progress.ended(point, f"{outcome.state} after {seconds}: {outcome.error}")

    def _note(self) -> str:
        if self._signals.received is not None:
            return saving(self._signals.received)
        return f"{len(self._waiting)} more to start" if self._waiting else ""

    def _raise_if_stopped(self) -> None:
        ended = (self._ended.get(point.name) for point in self._points)
        stopped = [o.point for o in ended if o is not None and o.state == "stopped"]
        at = [point.dir for point in stopped or list(self._waiting)[:1]]
        if not at and self._more_follows and self._signals.received is not None:
            # All have paused; after the signal none of them is to train on.
            at = [self._points[0].dir.parent]
        if at:
            raise Stopped(f"at {', '.join(map(str, at))}; run the same command to continue")


def _start_worker(point: Point, variables: dict[str, str]) -> _Worker:
    run_dir = RunDir(point.dir)
    if not _is_in_use(run_dir):
        run_dir.write_status(state="queued", last_error=None)
    with (run_dir.logs / "console.log").open("ab") as log:
        process = subprocess.Popen(
            worker_command(point.dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            # In a new process group, so that a signal reaches it once, through this process.
            process_group=0,
        )
    return _Worker(point, process, time.monotonic())


def worker_command(path: Path) -> list[str]:
    """Return the command that trains the run in folder `path`."""
    return [sys.executable, "-u", "-m", "lunaris.launch.worker", str(path)]


def shown_loss(outcome: Outcome) -> str:
    """Return the best validation loss of a point in words."""
    return "no validation" if outcome.val_loss is None else f"val loss {outcome.val_loss:.4f}"


def _reached(outcome: Outcome) -> str:
    """Return how far a point has trained that is done or paused."""
    return "done" if outcome.state == "done" else f"at step {outcome.point.cfg.trainer.end()}"


def _record_exit(run_dir: RunDir, code: int, forwarded: signal.Signals | None = None) -> None:
    """Write the status of a worker that could not write it itself, because it was killed say.

    forwarded: the signal that it was sent, if any.
    """
    status = run_dir.read_status()
    started = status.get("state") != "queued"
    if forwarded is not None and (code < 0 or (code == 1 and not started)):
        # It died before it could handle the signal: nothing is saved or wrong.
        run_dir.write_status(state="stopped")
        return
    if code != 0 and status.get("state") in ACTIVE and not _is_in_use(run_dir):
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = status.get("last_error") or ("" if code == 2 else how)
        run_dir.write_status(state="failed", **({"last_error": error} if error else {}))


def _is_in_use(run_dir: RunDir) -> bool:
    """Return whether a process of another command trains the run, which refused ours."""
    try:
        run_dir.lock().close()
    except UserError:
        return True
    return False
