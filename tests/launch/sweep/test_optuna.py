"""Sweeps whose points Optuna chooses: one study a folder, which the same command continues."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.config.compose import compose
from lunaris.errors import Stopped
from lunaris.launch.sweep import run_points
from lunaris.launch.sweep.points import Outcome, Point
from lunaris.runs.run_dir import RunDir
from lunaris.runs.sweep_manifest import read_manifest

needs_plugin = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed",
)
RATES = "optimizer.learning_rate=interval(1e-4,1e-2)"
# 1,000 is what the sampler would draw first, again, had the study not gone on.
ARGV = ["train", "-m", "data=synthetic", "name=s", "hydra/sweeper=optuna", RATES]
ARGV += ["hydra.sweeper.sampler.seed=1000"]
STUDY = Path("sweeps/s/study.db")

# Stands for the worker: the loss is smallest at the end of the interval. It counts its starts, and
# does what the file `next` says, once.
WORKER = """\
import json, os, pathlib, sys, yaml
folder = pathlib.Path(sys.argv[1])
cfg = yaml.safe_load((folder / "config.yaml").read_text())
with (folder / "starts").open("a") as file:
    file.write("x")
loss = 1 - cfg["optimizer"]["learning_rate"]
if os.path.exists("next"):
    what = pathlib.Path("next").read_text()
    os.remove("next")
    if what == "fail":
        raise RuntimeError("unlucky")
    loss = float(what)
status = {"state": "done", "step": 2, "best_val_loss": loss}
(folder / "status.json").write_text(json.dumps(status))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the training of a point by a script that takes a tenth of a second."""
    monkeypatch.setattr(run_points, "_POLL_S", 0.02)

    def command(path: Path) -> list[str]:
        return [sys.executable, "-I", "-c", WORKER, str(path)]

    monkeypatch.setattr(run_points, "worker_command", command)


def trials(n: int) -> str:
    return f"hydra.sweeper.n_trials={n}"


def points() -> list[str]:
    return [point.name for point in read_manifest(Path("sweeps/s")).points]


def starts(name: str) -> int:
    return len((Path("sweeps/s") / name / "starts").read_text())


@needs_plugin
def test_the_same_command_goes_on_with_its_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGV, trials(2)]) == 0
    assert STUDY.is_file() and "study   " not in capsys.readouterr().out
    first = points()
    assert main([*ARGV, trials(2)]) == 0
    shown = capsys.readouterr()
    assert "study   sweeps/s/study.db: 2 of 2 trials are done\n" in shown.out
    assert "sweep sweeps/s: 2 done" in shown.out and shown.err == ""
    assert main([*ARGV, trials(4)]) == 0
    shown = capsys.readouterr()
    assert "sweep sweeps/s: 4 done" in shown.out
    # Every earlier point is kept, none is trained again, and the seed draws no point twice.
    assert points()[:2] == first and len(points()) == 4
    assert [starts(name) for name in points()] == [1, 1, 1, 1]
    assert not (Path.cwd() / "study.db").exists()


@needs_plugin
def test_the_best_point_of_the_folder_is_named_with_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("next").write_text("-5")
    assert main([*ARGV, trials(1)]) == 0
    (best,) = points()
    capsys.readouterr()
    assert main([*ARGV, trials(3)]) == 0
    shown = capsys.readouterr().out
    command = re.search(rf"best: {re.escape(best)}, val loss -5.0000 \(.*\)\n +(\S.*)", shown)
    assert command
    program, verb, *overrides = shlex.split(command[1])
    assert (program, verb) == ("lunaris", "train")
    rate = float(best.partition("=")[2])
    cfg = compose(overrides)
    assert cfg.optimizer.learning_rate == rate and cfg.out_dir == f"runs/{cfg.name}"


@needs_plugin
def test_a_failed_point_stops_no_other_and_is_tried_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("next").write_text("fail")
    assert main([*ARGV, trials(2)]) == 1
    shown = capsys.readouterr()
    failed, other = points()
    assert "1 done, 1 failed" in shown.out and f"failed: {failed}: exit code 1" in shown.out
    assert "Traceback" not in shown.err and "Error executing" not in shown.err
    assert main([*ARGV, trials(2)]) == 0
    assert "1 of 2 trials are done, 1 to be tried again" in capsys.readouterr().out
    assert points() == [failed, other] and (starts(failed), starts(other)) == (2, 1)


@needs_plugin
def test_too_many_failures_end_the_sweep_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("next").write_text("fail")
    assert main([*ARGV, trials(9), "hydra.sweeper.max_failure_rate=0"]) == 1
    shown = capsys.readouterr()
    assert "sweep sweeps/s: 1 failed" in shown.out and shown.err == ""


@needs_plugin
def test_a_stopped_point_is_continued_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_points.run_points

    def stop(points: list[Point], progress: Any, *, more_follows: bool) -> list[Outcome]:
        RunDir(points[0].dir).write_status(state="stopped")
        raise Stopped("at the second point")

    assert main([*ARGV, trials(1)]) == 0
    monkeypatch.setattr(run_points, "run_points", stop)
    assert main([*ARGV, trials(3)]) == 3
    monkeypatch.setattr(run_points, "run_points", run)
    done, stopped = points()
    assert main([*ARGV, trials(2)]) == 0
    assert "1 of 2 trials are done, 1 to be tried again" in capsys.readouterr().out
    assert points() == [done, stopped] and starts(stopped) == 1


@needs_plugin
def test_a_point_that_ended_without_a_loss_is_not_tried_again() -> None:
    Path("next").write_text("nan")
    main([*ARGV, trials(2)])
    before = points()
    main([*ARGV, trials(3)])
    assert points()[:2] == before and len(points()) == 3
    assert [starts(name) for name in points()] == [1, 1, 1]


@needs_plugin
def test_points_of_other_values_are_not_one_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGV, trials(1)]) == 0
    assert main([*ARGV, trials(2), "trainer.log_interval=7"]) == 0
    assert main([*ARGV, trials(3), "model.n_layers=2"]) == 2
    said = capsys.readouterr().err
    assert "error: sweeps/s: its study is of points with other values" in said
    assert re.search(r"model\.n_layers: \d+ → 2", said) and len(points()) == 2


@needs_plugin
def test_a_study_of_a_storage_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGV, "hydra.sweeper.storage=sqlite:///mine.db"]
    assert main([*argv, trials(1)]) == 0 and main([*argv, trials(2)]) == 0
    assert "study   sqlite:///mine.db: 1 of 2 trials are done" in capsys.readouterr().out
    assert Path("mine.db").is_file() and not STUDY.exists() and len(points()) == 2


@needs_plugin
def test_a_damaged_study_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    STUDY.parent.mkdir(parents=True)
    STUDY.write_bytes(b"no database" * 100)
    assert main(ARGV) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: sweeps/s/study.db: cannot be opened as a study: ")
    assert "not a database" in said and said.count("\n") == 1
    assert os.listdir("sweeps/s") == ["study.db"]


@needs_plugin
def test_the_folder_may_have_any_name() -> None:
    argv = [text for text in ARGV if text != "name=s"]
    for n in (1, 2):
        assert main([*argv, trials(n), "out_dir='a ?b#c&d%41=é'"]) == 0
    (folder,) = Path().iterdir()
    assert (folder / "study.db").is_file()
    assert len(read_manifest(folder).points) == 2


@needs_plugin
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([trials(0)], "hydra.sweeper.n_trials=0: must be at least 1"),
        (["hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0: must be at least 1"),
        (["hydra.sweeper.max_failure_rate=2"], "max_failure_rate=2.0: must be between 0 and 1"),
        (["optimizer.learning_rate=1e-3"], "hydra/sweeper=optuna: no key is swept"),
        (["moe.n_experts=4,8,0"], "moe.n_experts=0: must be at least"),
        (["optimizer.learning_rate=interval(-1,1)"], "optimizer.learning_rate=-1.0"),
        (["model.n_heads=range(2,7)"], "model.n_heads=7"),
        (["schedule=glob(*)"], "schedule=glob(*): hydra/sweeper=optuna takes a list"),
        (
            ["hydra.sweeper.storage=nope://x"],
            "hydra.sweeper.storage=nope://x: cannot be opened as a study: Can't load plugin",
        ),
        (
            ["hydra.sweeper.storage=sqlite:////nowhere/x.db"],
            "hydra.sweeper.storage=sqlite:////nowhere/x.db: cannot be opened as a study",
        ),
        (["launch=slurm"], "it needs launch.wait=true"),
        (["--zip", "seed=1,2"], "--zip: goes with hydra/sweeper=lunaris"),
        (["--dry-run"], "--dry-run: goes with the sweeper and launchers of this package"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_what_optuna_could_not_run_is_refused_before_anything_is_written(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = overrides[0].partition("=")[0]
    argv = [text for text in ARGV if not text.startswith(f"{key}=")]
    assert main([*argv, *overrides]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1 and "Traceback" not in said
    assert not os.listdir()


@needs_plugin
def test_a_database_library_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import optuna

    def refuse(url: str) -> None:
        assert url is None

    monkeypatch.setattr(optuna.storages, "RDBStorage", refuse)
    assert main(ARGV) == 2
    said = capsys.readouterr().err
    assert "cannot write its study with SQLAlchemy" in said and "lunaris-codex[optuna]" in said
    assert not os.listdir()


def test_a_plugin_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_optuna_sweeper", None)
    assert main(ARGV) == 2
    said = capsys.readouterr().err
    assert "hydra/sweeper=optuna needs hydra_plugins.hydra_optuna_sweeper" in said
    assert "pip install 'lunaris-codex[optuna]'" in said and not os.listdir()


@needs_plugin
@pytest.mark.slow
def test_real_points_whose_command_is_killed() -> None:
    """The training processes are real, and the second command starts after a SIGKILL."""
    tiny = ["data.n_tokens=5000", "data.vocab_size=64", "model.d_model=16", "model.n_layers=1"]
    tiny += ["model.n_heads=2", "model.n_kv_heads=1", "model.max_seq_len=16", "moe=none"]
    tiny += ["trainer.eval_steps=1", "trainer.max_steps=2"]
    command = [sys.executable, "-m", "lunaris", *ARGV, *tiny]
    with subprocess.Popen([*command, trials(9)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert ": done in " in process.stdout.readline()
        process.kill()
    done = subprocess.run([*command, trials(3)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"study   sweeps/s/study.db: [01] of 3 trials are done", done.stdout)
    assert "sweep sweeps/s: 3 done" in done.stdout and done.stderr == ""
    states = [RunDir(Path("sweeps/s") / name).read_status()["state"] for name in points()]
    assert states == ["done"] * 3
