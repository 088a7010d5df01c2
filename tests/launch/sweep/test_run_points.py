"""Points of a sweep that run at the same time on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.config.compose import compose
from lunaris.errors import Stopped
from lunaris.launch.sweep import run_points
from lunaris.launch.sweep.points import Point
from lunaris.launch.sweep.progress import Silent
from lunaris.metrics.records import read_rows
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir

ARGV = ["train", "-m", "data=synthetic", "name=s"]
REAL_COMMAND = run_points.worker_command

# Stands for the worker. It writes when it begins and ends, waits until as many as `together` says
# have begun, and then does what `seed` says: 13 fails, 9 is killed, from 100 on it waits for a
# signal, at which it saves, except 200, which dies of it.
WORKER = """\
import json, os, pathlib, signal, sys, time, yaml
folder = pathlib.Path(sys.argv[1])
seed = yaml.safe_load((folder / "config.yaml").read_text())["seed"]
def note(what):
    with open("events", "a") as file:
        file.write(f"{what} {seed} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
def status(**content):
    (folder / "status.json").write_text(json.dumps(content))
def stop(number, frame):
    status(state="stopped", step=1)
    note(signal.Signals(number).name)
    sys.exit(3)
if seed != 200:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
note("begin")
end = time.monotonic() + 20
together = int(pathlib.Path("together").read_text())
while pathlib.Path("events").read_text().count("begin") < together and time.monotonic() < end:
    time.sleep(0.01)
if seed >= 100 and not os.path.exists("go"):
    time.sleep(20)
note("end")
if seed == 13:
    raise RuntimeError("unlucky")
if seed == 9:
    os.kill(os.getpid(), signal.SIGKILL)
status(state="done", step=2, best_val_loss=seed / 1000)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the training of a point by `WORKER`."""

    def command(path: Path) -> list[str]:
        return [sys.executable, "-I", "-c", WORKER, str(path)]

    monkeypatch.setattr(run_points, "worker_command", command)
    monkeypatch.setattr(run_points, "_POLL_S", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("together").write_text("1")


def test_a_point_that_another_command_trains_is_left_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands of one sweep at once: one process of a point gets the lock, one is refused."""
    real = run_points._start_worker

    def start(point: Point, variables: dict[str, str]) -> Any:
        run_dir = RunDir(point.dir)
        locks.append(run_dir.lock())
        run_dir.write_status(state="running", step=3)
        return real(point, variables)

    locks: list[Any] = []
    monkeypatch.setattr(run_points, "_start_worker", start)
    monkeypatch.setattr(
        run_points, "worker_command", lambda path: [sys.executable, "-I", "-c", "exit(2)"]
    )
    assert main([*ARGV, "seed=1,2"]) == 0
    for point in Path("sweeps/s").glob("seed=*"):
        status = RunDir(point).read_status()
        assert (status["state"], status.get("last_error")) == ("running", None)
    assert "sweep sweeps/s: 2 running" in capsys.readouterr().out
    for lock in locks:
        lock.close()
    # Without the other command it is a failure.
    monkeypatch.setattr(run_points, "_start_worker", real)
    assert main([*ARGV, "seed=1,2"]) == 1
    assert "sweep sweeps/s: 2 failed" in capsys.readouterr().out


def events() -> list[tuple[str, str, str]]:
    """Return what the workers wrote, in its order: what, seed, GPUs."""
    lines = Path("events").read_text().splitlines()
    return [(what, seed, gpus) for what, seed, gpus in (line.split(" ") for line in lines)]


def most_at_once() -> int:
    running = most = 0
    for what, *_ in events():
        running += {"begin": 1, "end": -1}.get(what, 0)
        most = max(most, running)
    return most


def states(*seeds: int) -> list[str]:
    return [RunDir(f"sweeps/s/seed={seed}").read_status()["state"] for seed in seeds]


def after(condition: Callable[[], bool], number: signal.Signals) -> None:
    """Send this process a signal once a condition holds."""

    def wait() -> None:
        end = time.monotonic() + 15
        while time.monotonic() < end:
            if condition():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    Thread(target=wait, daemon=True).start()


def begun(n: int) -> Callable[[], bool]:
    return lambda: Path("events").exists() and len(events()) >= n


def test_as_many_points_as_asked_for_run_at_once_and_one_that_fails_makes_room(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("together").write_text("2")
    assert main([*ARGV, "launch.points_at_once=2", "seed=13,1,9,2"]) == 1
    # The first two waited for each other; never were there three.
    assert most_at_once() == 2
    assert states(13, 1, 9, 2) == ["failed", "done", "failed", "done"]
    printed = capsys.readouterr().out
    assert "[2/4] seed=1: done in 0 s, val loss 0.0010\n" in printed
    assert "[1/4] seed=13: failed after 0 s: exit code 1\n" in printed
    assert "[3/4] seed=9: failed after 0 s: killed by SIGKILL\n" in printed
    # The summary has the order of the command line.
    assert printed.index("failed: seed=13: exit code 1") < printed.index("failed: seed=9: killed")
    assert "sweep sweeps/s: 2 done, 2 failed" in printed
    began = [seed for what, seed, _ in events() if what == "begin"]
    assert sorted(began[:2]) == ["1", "13"]


def test_without_gpus_one_point_runs_at_a_time() -> None:
    assert main([*ARGV, "seed=1,2,3"]) == 0
    assert most_at_once() == 1
    assert [seed for what, seed, _ in events() if what == "begin"] == ["1", "2", "3"]


def test_each_point_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    Path("together").write_text("3")
    assert main([*ARGV, "seed=1,2,3,4"]) == 0
    assert most_at_once() == 3
    began = [(seed, gpus) for what, seed, gpus in events() if what == "begin"]
    assert sorted(began[:3]) == [("1", "4"), ("2", "5"), ("3", "6")]
    assert began[3][0] == "4" and began[3][1] in ("4", "5", "6")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_running_point_and_the_same_command_continues(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*ARGV, "launch.points_at_once=2", "seed=100,101,102"]
    after(begun(2), number)
    assert main(argv) == 3
    said = capsys.readouterr()
    # A log of an earlier test may complain there that its stream is closed.
    stopped = "stopped: at sweeps/s/seed=100, sweeps/s/seed=101; run the same command to continue"
    assert stopped in said.err.splitlines()
    assert "[1/3] seed=100: stopped after 0 s" in said.out
    assert states(100, 101, 102) == ["stopped", "stopped", "queued"]
    signalled = sorted((what, seed) for what, seed, _ in events() if what.startswith("SIG"))
    assert signalled == [(number.name, "100"), (number.name, "101")]
    Path("go").touch()
    assert main(argv) == 0
    assert states(100, 101, 102) == ["done"] * 3


def test_a_point_that_gets_a_signal_of_its_own_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = run_points._start_worker

    def start_and_stop(point: Point, variables: dict[str, str]) -> Any:
        worker = start(point, variables)
        if point.name == "seed=100":
            while not (begun(1)() and any(seed == "100" for _, seed, _ in events())):
                time.sleep(0.01)
            worker.process.terminate()
        return worker

    monkeypatch.setattr(run_points, "_start_worker", start_and_stop)
    assert main([*ARGV, "seed=100,1"]) == 3
    assert states(100, 1) == ["stopped", "done"]
    said = capsys.readouterr()
    assert "at sweeps/s/seed=100; run the same command" in said.err
    assert "[2/2] seed=1: done" in said.out


def test_a_worker_that_dies_of_a_forwarded_signal_is_stopped_not_failed(
    tiny: Callable[..., Any],
) -> None:
    # As a worker does before it has a handler.
    cfg = tiny("seed=200")
    run_dir = create(cfg, "test", [])
    after(begun(1), signal.SIGTERM)
    with pytest.raises(Stopped, match="run the same command to continue"):
        run_points.run_points([Point("p", [], cfg, run_dir.path)], Silent())
    assert run_dir.read_status()["state"] == "stopped"


def test_a_sweep_that_breaks_leaves_no_process_behind(
    tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Silent):
        def draw(self, note: str) -> None:
            if begun(1)():
                raise RuntimeError("the display broke")

    cfg = tiny("seed=100")
    run_dir = create(cfg, "test", [])
    with pytest.raises(RuntimeError, match="the display broke"):
        run_points.run_points([Point("p", [], cfg, run_dir.path)], Broken())
    assert run_dir.read_status()["state"] == "stopped"


@pytest.mark.slow
def test_points_at_once_have_the_numbers_of_one_run_at_a_time(
    run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(run_dir: RunDir) -> list[dict[str, Any]]:
        """Return the rows without what depends on the machine."""
        found = read_rows(run_dir.metrics_path)
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found]

    monkeypatch.setattr(run_points, "worker_command", REAL_COMMAND)
    argv = ["experiment=smoke", "seed=1,2", "launch.points_at_once=2", "name=s"]
    assert main(["train", "-m", *argv]) == 0
    alone = [
        rows(run_here(compose(["experiment=smoke", f"seed={seed}", f"name={seed}"])))
        for seed in (1, 2)
    ]
    assert [rows(RunDir(f"sweeps/s/seed={seed}")) for seed in (1, 2)] == alone
    assert sum("train/loss" in row for row in alone[0]) == 5 and alone[0] != alone[1]
