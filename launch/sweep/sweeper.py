"""Sweeps on this machine: Hydra expands the points, each runs as a process of its own."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction

from lunaris.config.cli import Flags
from lunaris.config.compose import Composer, config_dirs
from lunaris.config.overrides import check, open_maps, parse, quoted
from lunaris.config.run_names import sweep_name
from lunaris.errors import Stopped, UserError
from lunaris.launch.sweep.hydra_bridge import hand_to_hydra
from lunaris.launch.sweep.points import Outcome, Point, Sweep, outcome_of
from lunaris.runs.run_dir import RunDir

_POLL_S = 0.2
# Points whose checking takes so long that a person wonders: about a tenth of a second each.
_MANY = 20


class PointFailed(RuntimeError):
    """Says that a point of a sweep did not end well; its message holds the last error."""


def sweep(flags: Flags, command: str) -> int:
    """Run or send every point of a sweep; return 1 if any failed. Raises Stopped at a signal."""
    if "RANK" in os.environ:
        raise UserError("--multirun: not under torchrun; give launch.processes=N instead")
    parsed = parse(flags.overrides)
    check(parsed, config_dirs(flags.source), sweep=True)
    task = _SweepTask(_sweep_of(flags, parsed, command))
    fixed = [o.input_line or "" for o in parsed if not o.is_sweep_override()]
    hydra = Composer(flags.source).unchecked(fixed, with_hydra=True).hydra
    plugins = [hydra.sweeper._target_, hydra.launcher._target_]
    hand_to_hydra(flags, [f"hydra.sweep.dir={quoted(str(task.sweep.dir))}"], task, plugins)
    # Another launcher's points are run by other processes, which leave their folders.
    ended = task.sweep.outcomes or [outcome_of(point) for point in task.sweep.points()]
    outcomes = {outcome.point.name: outcome for outcome in ended}
    print(summary(task.sweep, list(outcomes.values())))
    return int(any(outcome.state == "failed" for outcome in outcomes.values()))


class _SweepTask:
    """What Hydra calls for a point when a launcher of its own runs it; ours use `sweep` only."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def __call__(self, cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        if "SUBMITIT_EXECUTOR" in os.environ:
            from lunaris.launch.sweep.slurm_array import train_in_job

            return train_in_job(self.sweep, list(HydraConfig.get().overrides.task))
        points = self.sweep.plan([list(HydraConfig.get().overrides.task)])
        self.sweep.freeze(points)
        return returned(run_point(points[0], lambda line: None)).return_value


class Product(Sweeper):
    """Every combination of the swept values, all handed to the launcher at once.

    As Hydra's basic sweeper, but it writes nothing itself, so that a sweep in which any point is
    wrong leaves no trace. `params`: further overrides, as for Hydra's own.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self._params = params or {}
        self._launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: Any
    ) -> None:
        from hydra.core.plugins import Plugins

        assert isinstance(task_function, _SweepTask)
        self._sweep = task_function.sweep
        self._config_loader = hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Launch the points and return how each ended."""
        assert self._launcher is not None
        given = [f"{key}={value}" for key, value in self._params.items()]
        points = expand([*given, *arguments], self._config_loader)
        if not isinstance(self._launcher, PointLauncher):
            # Hydra's own launchers would find a wrong point only when its turn comes.
            self._sweep.plan(points)
        return self._launcher.launch(points, initial_job_idx=0)


class PointLauncher(Launcher):
    """A Hydra launcher that freezes every point's folder before it starts any."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: Any
    ) -> None:
        assert isinstance(task_function, _SweepTask)
        self._sweep = task_function.sweep

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all points, write their folders, run or send them, return how each ended."""
        if len(job_overrides) > _MANY:
            print(f"checking {len(job_overrides)} points", flush=True)
        points = self._sweep.plan(job_overrides)
        self._sweep.freeze(points)
        outcomes = {outcome.point.name: outcome for outcome in self.run(self._sweep, points)}
        self._sweep.outcomes += outcomes.values()
        names = [self._sweep.name_of(list(overrides)) for overrides in job_overrides]
        return [returned(outcomes[name]) for name in names]

    def run(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Run or send the points, whose folders are ready; return one outcome a point."""
        raise NotImplementedError


class LocalSweep(PointLauncher):
    """Runs the points here, one after the other; a failing one does not stop the others."""

    def run(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Run what is not done yet. Raises Stopped at a signal, the current point saved."""
        first = len(sweep.outcomes)
        outcomes = []
        for i, point in enumerate(points):
            label = f"[{first + i + 1}/{first + len(points)}] {point.name}"
            outcomes.append(run_point(point, console(label)))
        return outcomes


def run_point(point: Point, show: Callable[[str], None]) -> Outcome:
    """Train one point as a process of its own, unless it is done; return how it ended.

    Its output goes to its own logs; `show` is called with how far it is. A signal is passed on:
    the point saves and stops, then Stopped is raised.
    """
    if point.done:
        outcome = outcome_of(point)
        show(f"done before, {_loss(outcome)}\n")
        return outcome
    run_dir = RunDir(point.dir)
    run_dir.write_status(state="queued", last_error=None)
    started = time.monotonic()
    with (run_dir.logs / "console.log").open("ab") as log, _PassedOn() as signals:
        worker = subprocess.Popen(
            worker_command(point.dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Signals reach it through us, once each.
            process_group=0,
        )
        signals.child = worker
        while True:
            try:
                code = worker.wait(_POLL_S)
                break
            except subprocess.TimeoutExpired:
                status = run_dir.read_status()
                show(f"step {status.get('step', 0)}/{point.cfg.trainer.max_steps}")
    if code < 0 and signals.received:
        # Before it could note the signal: nothing is saved, and nothing is wrong.
        run_dir.write_status(state="stopped")
    elif code != 0:
        _settle(run_dir, code)
    outcome = outcome_of(point)
    seconds = f"{time.monotonic() - started:.0f} s"
    if outcome.state == "done":
        show(f"done in {seconds}, {_loss(outcome)}\n")
    else:
        show(f"{outcome.state} after {seconds}: {outcome.error}\n")
    if signals.received or outcome.state == "stopped":
        raise Stopped(f"at {point.dir}; the same command goes on")
    return outcome


def worker_command(path: Path) -> list[str]:
    """Return the command that trains the run in folder `path`."""
    return [sys.executable, "-u", "-m", "lunaris.launch.worker", str(path)]


def expand(overrides: list[str], config_loader: ConfigLoader | None = None) -> list[list[str]]:
    """Return the overrides of every point: the product of all swept values.

    config_loader: Hydra's, which knows the options that a `glob(…)` stands for. Raises UserError
    for an interval, and for a key without any value.
    """
    last: dict[str, list[str]] = {}
    for override in parse(overrides, config_loader):
        key = override.get_key_element()
        last.pop(key, None)
        last[key] = [f"{key}={value}" for value in _values(override)]
        if not last[key]:
            raise UserError(f"{override.input_line}: stands for no value; there is nothing to run")
    return [list(point) for point in itertools.product(*last.values())]


def returned(outcome: Outcome) -> JobReturn:
    """Return an outcome as Hydra's sweepers take it: the best validation loss, or the error."""
    result = JobReturn(
        overrides=outcome.point.overrides,
        cfg=outcome.point.cfg,
        working_dir=str(outcome.point.dir),
        task_name="train",
        status=JobStatus.FAILED if outcome.state == "failed" else JobStatus.COMPLETED,
    )
    failed = outcome.state == "failed"
    result.return_value = PointFailed(outcome.error) if failed else outcome.val_loss
    return result


def summary(sweep: Sweep, outcomes: list[Outcome]) -> str:
    """Return what a sweep's end says: how many points ended how, the best, all that failed."""
    states = [outcome.state for outcome in outcomes]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = ["", f"sweep {sweep.dir}: {counts or 'no points'}"]
    losses = [o for o in outcomes if o.state == "done" and o.val_loss is not None]
    if losses:
        best = min(losses, key=lambda o: o.val_loss or 0.0)
        lines.append(f"best: {best.point.name}, {_loss(best)} ({best.point.dir})")
    for outcome in outcomes:
        if outcome.state == "failed":
            lines.append(f"failed: {outcome.point.name}: {outcome.error}")
            lines.append(f"        log: {outcome.log or outcome.point.dir}")
    return "\n".join(lines)


def _sweep_of(flags: Flags, parsed: list[Override], command: str) -> Sweep:
    swept = [o.input_line or "" for o in parsed if o.is_sweep_override()]
    task = [o.input_line or "" for o in parsed if not o.is_hydra_override()]
    given = {o.key_or_group: o.value() for o in parsed if not o.is_sweep_override()}
    name = str(given.get("name") or sweep_name(task, swept))
    asked = given.get("hydra.sweep.dir") or given.get("out_dir") or f"sweeps/{name}"
    # Hydra's sweepers write values anew: 1e-3 becomes 0.001.
    anew = [
        f"{o.get_key_element()}={o.get_value_element_as_str()}"
        for o in [*parsed, *parse(open_maps(parsed))]
        if not (o.is_sweep_override() or o.is_hydra_override())
    ]
    folder = str(asked).replace("${name}", name)
    if "${" in folder:
        raise UserError(
            f"out_dir={asked}: of a sweep, ${{name}} alone can stand for something; every point "
            "has a folder of its own within"
        )
    found = [o.input_line or "" for o in parsed if o.key_or_group == "hydra.searchpath"]
    source = replace(flags.source, overrides=tuple(found))
    return Sweep(Path(folder), command, {*task, *anew}, source)


def _values(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        return iter([override.get_value_element_as_str()])
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: this sweeper takes values one by one, not an interval"
        )
    return override.sweep_string_iterator()


def _settle(run_dir: RunDir, code: int) -> None:
    """Write down how a worker ended that could not do so itself, like one that was killed."""
    status = run_dir.read_status()
    if status.get("state") in ("queued", "running"):
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = status.get("last_error") or ("" if code == 2 else how)
        run_dir.write_status(state="failed", **({"last_error": error} if error else {}))


class _PassedOn:
    """Passes SIGTERM and SIGINT on to `child` while in its context."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.received = False

    def __enter__(self) -> _PassedOn:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.child is not None:
            self.child.send_signal(number)


def console(label: str) -> Callable[[str], None]:
    """Return what shows a point's line: written over on a terminal, else once at its end."""
    live = sys.stdout.isatty()

    def show(line: str) -> None:
        if live:
            print(f"\r\x1b[K{label}: {line}", end="", flush=True)
        elif line.endswith("\n"):
            print(f"{label}: {line}", end="", flush=True)

    return show


def _loss(outcome: Outcome) -> str:
    return "no validation" if outcome.val_loss is None else f"val loss {outcome.val_loss:.4f}"
