"""The summary of a sweep: its order depends on the command line alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins

from lunaris.__main__ import main
from lunaris.config.schema.root import Config
from lunaris.launch.sweep.points import Outcome, Point, Sweep
from lunaris.launch.sweep.run_points import LocalPoints
from lunaris.launch.sweep.start import summary
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import STATES
from lunaris.runs.sweep_manifest import read_manifest


def outcome(name: str, state: str, loss: float | None = None, error: str = "") -> Outcome:
    return Outcome(Point(name, [], Config(), Path("s") / name), state, loss, error)


def test_states_are_counted_in_one_order() -> None:
    ended = [outcome(str(i), state) for i, state in enumerate(reversed(STATES))]
    first = summary(Sweep(Path("s"), "", set()), ended).splitlines()[1]
    assert first == "sweep s: " + ", ".join(f"1 {state}" for state in STATES)
    assert summary(Sweep(Path("s"), "", set()), []).splitlines()[1] == "sweep s: no points"


def test_the_best_is_the_first_of_the_lowest_losses_of_points_that_are_done() -> None:
    ended = [
        outcome("a", "failed", 0.1, "Boom"),
        outcome("b", "done", 0.5),
        outcome("c", "done", 0.25),
        outcome("d", "done", 0.25),
        outcome("e", "done"),
        outcome("f", "failed", None, "Bang"),
    ]
    # A run of its own has a name and a folder of its own.
    ended[2].point.overrides.extend(["seed=3", "model.name=a b", "name=c", "out_dir=x"])
    assert summary(Sweep(Path("s"), "", set()), ended).splitlines()[1:] == [
        "sweep s: 4 done, 2 failed",
        "best: c, val loss 0.2500 (s/c)",
        "      lunaris train seed=3 'model.name=a b'",
        "failed: a: Boom",
        "        log: s/a",
        "failed: f: Bang",
        "        log: s/f",
    ]


@pytest.mark.parametrize(("seeds", "announced"), [(20, False), (21, True)])
def test_a_sweep_of_many_points_says_that_it_checks_them(
    seeds: int,
    announced: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def submit(self: LocalPoints, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        return [Outcome(point, "done") for point in points]

    monkeypatch.setattr(LocalPoints, "submit", submit)
    assert main(["train", "-m", "data=synthetic", f"seed=range(0,{seeds})"]) == 0
    printed = capsys.readouterr().out
    assert f"{seeds} done" in printed
    assert (f"checking {seeds} points" in printed) == announced


@pytest.mark.parametrize("sweeper", ["lunaris", "basic"])
def test_the_order_in_which_other_processes_run_the_points_does_not_show(
    sweeper: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    basic = Plugins.instance().class_name_to_class[name]
    launch = basic.launch  # type: ignore[attr-defined]

    def backwards(self: Any, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        return launch(self, list(reversed(overrides)), initial_job_idx)

    def fail(points: list[Point], progress: object) -> list[Outcome]:
        RunDir(points[0].dir).write_status(state="failed", last_error="Boom")
        return [Outcome(points[0], "done")]

    monkeypatch.setattr(basic, "launch", backwards)
    monkeypatch.setattr("lunaris.launch.sweep.hydra_bridge.run_points", fail)
    argv = ["data=synthetic", "name=s", "seed=1,3,2", f"hydra/sweeper={sweeper}"]
    assert main(["train", "-m", *argv, "hydra/launcher=basic"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    order = (1, 3, 2) if sweeper == "lunaris" else (1, 2, 3)
    assert failed == [f"failed: seed={seed}: Boom" for seed in order]
    if sweeper == "lunaris":
        points = [point.name for point in read_manifest(Path("sweeps/s")).points]
        assert points == ["seed=1", "seed=3", "seed=2"]
