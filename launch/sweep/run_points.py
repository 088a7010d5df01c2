"""The points of a sweep on this machine: one after the other, each in its own process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from lunaris.config.hydra_internals import PLUGIN_PACKAGE
from lunaris.distributed.signals import StopSignal, saving
from lunaris.errors import Stopped
from lunaris.launch.sweep.points import Outcome, Point, PointLauncher, Sweep, outcome_of
from lunaris.runs.run_dir import RunDir

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
    """Runs points here, one after the other; a point that fails does not stop the others."""

    def submit(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Freeze the points and run those that are not done; return an outcome for each.

        Raises Stopped at a signal, after the current point has saved.
        """
        sweep.freeze(points)
        # Of a sweeper that chooses points batch by batch, this is one batch.
        first = len(sweep.outcomes)
        outcomes = []
        for i, point in enumerate(points):
            label = f"[{first + i + 1}/{first + len(points)}] {point.name}"
            outcomes.append(run_point(point, console(label)))
        return outcomes


def run_point(point: Point, show: Callable[[str], None]) -> Outcome:
    """Train one point in its own process, unless it is done; return how it ended.

    The output of the process goes to the point's logs; `show` is called with its progress. A
    signal is forwarded: the point saves and stops, then Stopped is raised.
    """
    if point.done:
        outcome = outcome_of(point)
        show(f"already done, {shown_loss(outcome)}\n")
        return outcome
    run_dir = RunDir(point.dir)
    run_dir.write_status(state="queued", last_error=None)
    started = time.monotonic()
    code, signalled = _run_worker(point, run_dir, show)
    if code < 0 and signalled:
        # The worker died before it could handle the signal: nothing is saved or wrong.
        run_dir.write_status(state="stopped")
    elif code != 0:
        _record_exit(run_dir, code)
    outcome = outcome_of(point)
    seconds = f"{time.monotonic() - started:.0f} s"
    if outcome.state == "done":
        show(f"done in {seconds}, {shown_loss(outcome)}\n")
    else:
        show(f"{outcome.state} after {seconds}: {outcome.error}\n")
    if signalled or outcome.state == "stopped":
        raise Stopped(f"at {point.dir}; run the same command to continue")
    return outcome


def _run_worker(point: Point, run_dir: RunDir, show: Callable[[str], None]) -> tuple[int, bool]:
    """Run the point's worker; return its exit code and whether a signal was forwarded to it."""
    signals = _Forwarded()
    with (run_dir.logs / "console.log").open("ab") as log, signals:
        worker = subprocess.Popen(
            worker_command(point.dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # In a new process group, so that a signal reaches it once, through this process.
            process_group=0,
        )
        signals.child = worker
        while True:
            try:
                return worker.wait(_POLL_S), signals.received is not None
            except subprocess.TimeoutExpired:
                step = f"step {run_dir.read_status().get('step', 0)}/{point.cfg.trainer.max_steps}"
                show(step if signals.received is None else f"{step}, {saving(signals.received)}")


def worker_command(path: Path) -> list[str]:
    """Return the command that trains the run in folder `path`."""
    return [sys.executable, "-u", "-m", "lunaris.launch.worker", str(path)]


def console(label: str) -> Callable[[str], None]:
    """Return a function that shows a point's progress line.

    On a terminal the line is overwritten; elsewhere only the last one is printed.
    """
    live = sys.stdout.isatty()

    def show(line: str) -> None:
        if live:
            print(f"\r\x1b[K{label}: {line}", end="", flush=True)
        elif line.endswith("\n"):
            print(f"{label}: {line}", end="", flush=True)

    return show


def shown_loss(outcome: Outcome) -> str:
    """Return the best validation loss of a point in words."""
    return "no validation" if outcome.val_loss is None else f"val loss {outcome.val_loss:.4f}"


def _record_exit(run_dir: RunDir, code: int) -> None:
    """Write the status of a worker that could not write it itself, because it was killed say."""
    status = run_dir.read_status()
    if status.get("state") in ("queued", "running"):
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = status.get("last_error") or ("" if code == 2 else how)
        run_dir.write_status(state="failed", **({"last_error": error} if error else {}))


class _Forwarded(StopSignal):
    """Forwards every signal to `child`, too."""

    child: subprocess.Popen[bytes] | None = None

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.child is not None:
            self.child.send_signal(number)
