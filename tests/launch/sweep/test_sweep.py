"""Sweeps on this machine: what is written, what runs, what is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins

from lunaris.__main__ import main
from lunaris.config.identity import identity
from lunaris.config.overrides import parse
from lunaris.launch.sweep import run_points
from lunaris.launch.sweep.expand import expand
from lunaris.runs.run_dir import RunDir
from lunaris.runs.sweep_manifest import read_manifest

TINY = [
    "data=synthetic",
    "data.n_tokens=5000",
    "data.vocab_size=64",
    "model.d_model=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.max_seq_len=16",
    "trainer.max_steps=2",
    "trainer.eval_steps=1",
]

# Stands for the worker: its loss is the point's learning rate; it counts its starts, and fails
# where the seed is 13.
WORKER = """\
import json, pathlib, sys, yaml
folder = pathlib.Path(sys.argv[1])
cfg = yaml.safe_load((folder / "config.yaml").read_text())
with (folder / "starts").open("a") as file:
    file.write("x")
print("hello from", cfg["name"])
if cfg["seed"] == 13:
    raise RuntimeError("unlucky")
status = {"state": "done", "step": 2, "best_val_loss": cfg["optimizer"]["learning_rate"]}
(folder / "status.json").write_text(json.dumps(status))
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the training of a point by a script that takes a tenth of a second."""
    monkeypatch.setattr(run_points, "_POLL_S", 0.02)

    def command(path: Path) -> list[str]:
        return [sys.executable, "-I", "-c", WORKER, str(path)]

    monkeypatch.setattr(run_points, "worker_command", command)


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_every_point_has_its_folder_and_the_manifest_names_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [
        "train",
        "-m",
        *TINY,
        "name=s",
        "moe.n_experts=4,8",
        "optimizer.learning_rate=1e-3,1e-4",
    ]
    assert main(argv) == 0
    names = {
        f"moe.n_experts={e},optimizer.learning_rate={r}"
        for e in (4, 8)
        for r in ("0.001", "0.0001")
    }
    manifest = read_manifest(Path("sweeps/s"))
    assert manifest.name == "s"
    assert manifest.command.startswith("lunaris train -m data=synthetic")
    assert {point.name for point in manifest.points} == names
    for point in manifest.points:
        run_dir = RunDir(Path("sweeps/s") / point.dir)
        cfg = run_dir.read_config()
        assert run_dir.read_status()["state"] == "done"
        assert point.identity == json.loads(json.dumps(identity(cfg)))
        assert (cfg.name, cfg.out_dir) == (point.name, f"sweeps/s/{point.name}")
        assert f"moe.n_experts={cfg.moe.n_experts}" in point.overrides
        assert "hello from" in (run_dir.logs / "console.log").read_text()
    printed = capsys.readouterr().out
    assert "[1/4] moe.n_experts=4,optimizer.learning_rate=0.001: done in " in printed
    assert "sweep sweeps/s: 4 done" in printed
    assert "best: moe.n_experts=4,optimizer.learning_rate=0.0001, val loss 0.0001" in printed
    assert sorted(os.listdir()) == ["sweeps"]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_a_failing_point_is_reported_and_the_others_finish(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "-m", *TINY, "name=s", "seed=1,13,2"]) == 1
    printed = capsys.readouterr().out
    assert "sweep sweeps/s: 2 done, 1 failed" in printed
    assert "failed: seed=13: exit code 1" in printed
    assert "log: sweeps/s/seed=13/logs/console.log" in printed
    assert "RuntimeError: unlucky" in Path("sweeps/s/seed=13/logs/console.log").read_text()
    states = [RunDir(f"sweeps/s/seed={n}").read_status()["state"] for n in (1, 13, 2)]
    assert states == ["done", "failed", "done"]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_the_same_command_runs_only_what_is_not_done() -> None:
    argv = ["train", "-m", *TINY, "name=s", "seed=1,13", "optimizer.learning_rate=1e-3"]
    assert main(argv) == 1
    assert main(argv) == 1
    assert starts(Path("sweeps/s/seed=1")) == 1
    assert starts(Path("sweeps/s/seed=13")) == 2
    # A done point keeps the files of the command that ran it.
    config = RunDir("sweeps/s/seed=1").config_path.read_bytes()
    assert main([*argv, "trainer.log_interval=7"]) == 1
    assert RunDir("sweeps/s/seed=1").config_path.read_bytes() == config
    assert RunDir("sweeps/s/seed=13").read_config().trainer.log_interval == 7
    # More points of the same sweep join the manifest.
    argv[-2] = "seed=1,2"
    assert main(argv) == 0
    assert starts(Path("sweeps/s/seed=1")) == 1
    names = [point.name for point in read_manifest(Path("sweeps/s")).points]
    assert names == ["seed=1", "seed=13", "seed=2"]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_a_folder_of_another_config_is_refused_before_any_point_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "-m", *TINY, "name=s", "seed=1,3"]) == 0
    assert main(["train", "-m", *TINY, "name=s", "seed=2,1", "model.n_layers=2"]) == 2
    message = capsys.readouterr().err
    assert "sweeps/s/seed=1: holds a run of another config" in message
    assert "model.n_layers: 1 → 2" in message
    assert not Path("sweeps/s/seed=2").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["moe.n_experts=8,1", "moe.n_experts_per_token=2"], "must be at most moe.n_experts=1"),
        (["moe=switch,swich"], "moe=swich: no such option; allowed are "),
        (["moe.n_experts=4,eight"], "moe.n_experts=eight: must be a whole number"),
        (["moe.n_expert=4,8"], "moe.n_expert: no such key; did you mean moe.n_experts?"),
        (["+moe.n_expert=4,8"], "moe.n_expert: no such key; did you mean moe.n_experts?"),
        (["moe.n_expert=4", "seed=1,2"], "moe.n_expert: no such key; did you mean moe.n_experts?"),
        (["data=shards", "seed=1,2"], "point seed=1: data.dir: must be given"),
        (["seed=1,2", "trainer.max_steps=[1"], "the value cannot be read"),
        (["optimizer.learning_rate=interval(0,1)"], "values one by one, not an interval"),
        (["hydra/launcher=foo", "seed=1,2"], "hydra/launcher=foo: no such option"),
        (["hydra.foo=1,2"], "hydra.foo=1,2: a key of Hydra's own cannot be swept"),
        (["seed=1,2", "experiment=smoke,smok"], "did you mean smoke?"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_one_wrong_point_stops_the_sweep_before_anything_is_written(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err and "use +" not in captured.err
    assert os.listdir() == []


@pytest.mark.usefixtures("quick")
def test_a_swept_name_stands_before_what_else_is_swept() -> None:
    assert main(["train", "-m", *TINY, "name=x,y", "seed=1,2"]) == 0
    (folder,) = Path("sweeps").iterdir()
    runs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    assert runs == ["x,seed=1", "x,seed=2", "y,seed=1", "y,seed=2"]


def test_two_points_of_one_name_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lunaris.launch.sweep.points.point_name", lambda swept: "same")
    assert main(["train", "-m", *TINY, "name=s", "seed=1,2"]) == 2
    assert "point same: two points of the sweep have this name" in capsys.readouterr().err
    assert not Path("sweeps").exists()


@pytest.mark.usefixtures("quick")
def test_names_and_folders_follow_the_overrides() -> None:
    assert main(["train", "-m", *TINY, "name=a,b"]) == 0
    assert main(["train", "-m", *TINY, "out_dir=there/x", "seed=1,2"]) == 0
    assert main(["train", "-m", *TINY, "hydra.sweep.dir=where", "name=y", "seed=1,2"]) == 0
    assert Path("where/seed=2/config.yaml").is_file()
    assert main(["train", "-m", "experiment=smoke", "launch.collective_timeout_s=9,8"]) == 0
    (first,) = [p for p in Path("sweeps").iterdir() if "name=a-b" in p.name]
    shown = {p.name for p in first.iterdir() if not p.name.startswith(".")}
    assert shown == {"a", "b", "manifest.json"}
    shown = {p.name for p in Path("there/x").iterdir() if not p.name.startswith(".")}
    assert shown == {"seed=1", "seed=2", "manifest.json"}
    assert Path("sweeps/smoke,launch.collective_timeout_s=9-8").is_dir()


@pytest.mark.usefixtures("quick")
def test_wandb_learns_that_a_run_is_a_point_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = [*TINY, "logger=wandb", "logger.wandb.tags=[first]", "seed=1,2"]
    assert main(["train", "-m", *swept, "name=s"]) == 0
    found = RunDir("sweeps/s/seed=1").read_config().logger["wandb"]
    assert (found.group, found.job_type, found.tags) == ("s", "sweep", ["first", "seed=1"])
    for name in ("RUN_GROUP", "JOB_TYPE", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    assert main(["train", "-m", *swept, "name=t", "logger.wandb.tags=[]"]) == 0
    found = RunDir("sweeps/t/seed=1").read_config().logger["wandb"]
    assert (found.group, found.job_type, found.tags) == (None, None, [])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sweeper", ["lunaris", "basic"])
def test_values_of_a_sweep_may_stand_in_a_file(tmp_path: Path, sweeper: str) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/grid.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n"
    )
    argv = ["train", "-m", "-cd", "mine", *TINY, "experiment=grid", "name=s"]
    assert main([*argv, f"hydra/sweeper={sweeper}"]) == 0
    assert RunDir("sweeps/s/seed=2").read_status()["state"] == "done"


@pytest.mark.usefixtures("quick")
def test_another_sweeper_gets_each_points_validation_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def search(self: Any, arguments: list[str]) -> None:
        # As Optuna's does: batch by batch, each after the results of the one before.
        for batch, first in ((["seed=1", "seed=13"], 0), (["seed=2"], 2)):
            results = self.launcher.launch([[*arguments, text] for text in batch], first)
            seen.extend((result.status.name, result._return_value) for result in results)

    basic = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    monkeypatch.setattr(Plugins.instance().class_name_to_class[basic], "sweep", search)
    argv = [*TINY, "name=s", "hydra/sweeper=basic", "optimizer.learning_rate=0.5"]
    assert main(["train", "-m", *argv]) == 1
    assert seen[0] == ("COMPLETED", 0.5) and seen[2] == ("COMPLETED", 0.5)
    assert seen[1][0] == "FAILED" and "exit code 1" in str(seen[1][1])


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_hydras_own_launcher_can_run_the_points() -> None:
    argv = ["train", "-m", *TINY, "name=s", "seed=1,2", "hydra/launcher=basic"]
    assert main(argv) == 0
    assert RunDir("sweeps/s/seed=2").read_status()["state"] == "done"


@pytest.mark.usefixtures("quick")
def test_hydras_own_launcher_starts_nothing_when_a_point_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["train", "-m", *TINY, "name=s", "model.n_heads=2,3", "hydra/launcher=basic"]
    assert main(argv) == 2
    assert "point model.n_heads=3: " in capsys.readouterr().err
    assert not Path("sweeps").exists()


def test_expand_takes_ranges_and_choices_and_the_last_of_two() -> None:
    points = expand(parse(["seed=1", "moe=none,top2", "model.n_layers=range(1,3)", "seed=5"]))
    assert points == [
        [moe, layers, "seed=5"]
        for moe in ("moe=none", "moe=top2")
        for layers in ("model.n_layers=1", "model.n_layers=2")
    ]


def test_no_sweep_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "-m", "seed=1,2"]) == 2
    assert "not under torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_sweep_in_which_one_point_fails() -> None:
    argv = [*TINY, "name=s", "moe=none", "trainer.device=cpu,cuda", "optimizer.learning_rate=1e-3"]
    done = lunaris(["train", "-m", *argv])
    assert done.returncode == 1, done.stderr
    assert "sweep sweeps/s: 1 done, 1 failed" in done.stdout
    assert "failed: trainer.device=cuda: " in done.stdout
    assert "log: sweeps/s/trainer.device=cuda/logs/rank_0.log" in done.stdout
    assert RunDir("sweeps/s/trainer.device=cpu").read_status()["best_val_loss"] > 0
    # No warning of Hydra or torch is printed.
    assert done.stderr == ""


@pytest.mark.slow
def test_points_that_another_launchers_processes_ran_are_summed_up() -> None:
    argv = [*TINY, "name=s", "moe=none", "trainer.device=cpu,cuda", "optimizer.learning_rate=1e-3"]
    done = lunaris(["train", "-m", *argv, "hydra/launcher=submitit_local"])
    assert done.returncode == 1, done.stderr
    assert "sweep sweeps/s: 1 done, 1 failed" in done.stdout
    assert "best: trainer.device=cpu, val loss " in done.stdout
    assert "log: sweeps/s/trainer.device=cuda/logs/rank_0.log" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_point_and_ends_the_sweep(number: signal.Signals) -> None:
    argv = [*TINY, "name=s", "moe=none", "seed=1,2", "trainer.max_steps=1000000"]
    command = [sys.executable, "-m", "lunaris", "train", "-m", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: RunDir("sweeps/s/seed=1").read_status().get("state") == "running")
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "stopped: at sweeps/s/seed=1; run the same command to continue" in error
    assert RunDir("sweeps/s/seed=1").read_status()["state"] == "stopped"
    assert RunDir("sweeps/s/seed=2").read_status()["state"] == "queued"


def lunaris(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lunaris", *argv], capture_output=True, text=True, timeout=120
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


@pytest.mark.usefixtures("quick")
def test_a_glob_stands_for_the_options_that_match() -> None:
    assert main(["train", "-m", *TINY, "name=s", "schedule=glob([c*,w*],exclude=wsd)"]) == 0
    points = [row.name for row in read_manifest(Path("sweeps/s")).points]
    assert points == ["schedule=constant", "schedule=cosine"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=range(3,1)"], "seed=range(3,1): stands for no value"),
        (
            ["seed=1,2", "out_dir=sw_${seed}"],
            "out_dir=sw_${seed}: in the out_dir of a sweep only ${name}",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert main(["train", "-m", *TINY, "name=s", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("folder", ["mine", "we(ir=d'[x"])
def test_a_sweep_reads_its_options_where_a_single_run_does(folder: str) -> None:
    model = Path(folder, "model")
    model.mkdir(parents=True)
    (Path(folder) / "mytrain.yaml").write_text("defaults: [train, _self_]\n")
    (model / "one.yaml").write_text("rope_theta: 77.0\n")
    tiny = [*TINY, "model=one", "seed=1,2"]
    ways: list[list[str]] = [
        ["--config-dir", folder],
        ["--config-dir", folder, "--config-name", "mytrain"],
        ["--config-path", folder, "--config-name", "mytrain"],
    ]
    if folder == "mine":
        ways.append([f"hydra.searchpath=[file://{Path(folder).absolute()}]"])
    for i, way in enumerate(ways):
        assert main(["train", "-m", *way, *tiny, f"name=s{i}"]) == 0
        assert RunDir(f"sweeps/s{i}/seed=2").read_config().model.rope_theta == 77.0


@pytest.mark.parametrize("launch", ["local", "slurm"])
def test_a_dry_run_lists_every_point_with_what_differs_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, launch: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # Nothing is started or sent.
    swept = ["moe.n_experts=4,8", "moe=switch,top2"]
    argv = ["train", "-m", *TINY, "name=s", f"launch={launch}", "seed=5", *swept, "--dry-run"]
    assert main(argv) == 0
    title, heads, *points = capsys.readouterr().out.splitlines()
    assert title == "sweep sweeps/s: 4 points; --dry-run writes and sends nothing"
    assert heads.split() == ["run", "state", "step", "n_experts", "moe"]
    found = [line.split()[1:] for line in points]
    assert found == [["new", "0/2", e, m] for e in "48" for m in ("switch", "top2")]
    assert not os.listdir()


def test_a_dry_run_says_which_points_are_there_and_checks_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    RunDir("sweeps/s/seed=1").path.mkdir(parents=True)
    RunDir("sweeps/s/seed=1").write_status(state="done", step=2)
    assert main(["train", "-m", *TINY, "name=s", "seed=1,2", "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["seed=1", "done", "2/2", "1"], ["seed=2", "new", "0/2", "2"]]
    assert main(["train", "-m", *TINY, "name=s", "moe.n_experts=4,0", "--dry-run"]) == 2
    assert "moe.n_experts=0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--dry-run: goes with -m; of one run, `lunaris plan`"),
        (["-m", "hydra/sweeper=basic", "seed=1,2"], "--dry-run: goes with the sweeper and"),
    ],
)
def test_a_dry_run_of_what_cannot_be_listed_is_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(["train", *TINY, *argv, "--dry-run"]) == 2
    assert words in capsys.readouterr().err
    assert not os.listdir()
