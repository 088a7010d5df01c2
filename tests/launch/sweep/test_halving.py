"""Successive halving: which points train how far, and what a sweep cannot be compared by."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lunaris.__main__ import main
from lunaris.launch.sweep import halving, run_points
from lunaris.launch.sweep.halving import Rung, in_words, plan_rungs
from lunaris.launch.sweep.points import Point
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import RunState

ARGV = [
    "train", "-m", "hydra/sweeper=halving", "data=synthetic", "name=s", "trainer.max_steps=90",
    "trainer.eval_interval=5",
]  # fmt: skip

# Stands for the worker: trains on to the step at which the point pauses, with a validation loss
# that the seed gives. Seed 13 fails, seed 99 has no loss, seed 1 is stopped once at step 40, and
# seed 14 is killed once at step 35, before its first save. After seed 15 has paused, its parent
# gets a signal while it ends.
WORKER = """\
import json, os, pathlib, signal, sys, time, yaml
folder = pathlib.Path(sys.argv[1])
cfg = yaml.safe_load((folder / "config.yaml").read_text())
seed, trainer = cfg["seed"], cfg["trainer"]
before = json.loads((folder / "status.json").read_text()).get("step", 0)
def status(**content):
    (folder / "status.json").write_text(json.dumps(content))
def save(step):
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "files.json").write_text("{}")
def evaluate(step, loss):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "val/loss": loss}) + "\\n")
with open("trained", "a") as file:
    file.write(f"{seed} {trainer['stop_at']}\\n")
if seed == 13:
    raise RuntimeError("unlucky")
if seed == 1 and before == 30:
    save(40)
    status(state="stopped", step=40)
    sys.exit(3)
if seed == 14 and before == 0:
    status(state="running", step=35)
    os.kill(os.getpid(), signal.SIGKILL)
end = trainer["stop_at"] or trainer["max_steps"]
interval = trainer["eval_interval"]
for step in range(before - before % interval + interval, end + 1, interval):
    evaluate(step, float("nan") if seed == 99 else seed + 1 / step)
save(end)
loss = float("nan") if seed == 99 else seed + 1 / end
status(state="done" if end == trainer["max_steps"] else "paused", step=end, best_val_loss=loss)
if seed == 15 and trainer["stop_at"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.3)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the training of a point by `WORKER`."""

    def command(path: Path) -> list[str]:
        return [sys.executable, "-I", "-c", WORKER, str(path)]

    monkeypatch.setattr(run_points, "worker_command", command)
    monkeypatch.setattr(run_points, "_POLL_S", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def trained() -> list[str]:
    """Return the seed and the end of each process that ran, in their order."""
    return Path("trained").read_text().splitlines()


def states() -> dict[str, tuple[str, int]]:
    found = {path.name: RunDir(path).read_status() for path in Path("sweeps/s").glob("seed=*")}
    return {name: (str(s["state"]), s.get("step", 0)) for name, s in found.items()}


@pytest.mark.usefixtures("quick")
def test_of_nine_points_three_train_on_and_one_to_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seeds = [5, 3, 9, 2, 8, 7, 4, 6, 99]
    assert main([*ARGV, f"seed={','.join(map(str, seeds))}"]) == 0
    assert trained() == [
        *(f"{seed} 10" for seed in seeds), "3 30", "2 30", "4 30", "2 None",
    ]  # fmt: skip
    paused = {f"seed={seed}": ("paused", 10) for seed in (5, 9, 8, 7, 6, 99)}
    further = {"seed=3": ("paused", 30), "seed=4": ("paused", 30), "seed=2": ("done", 90)}
    assert states() == paused | further
    printed = capsys.readouterr().out
    assert "halving 9 points to step 10, 3 points to step 30, 1 point to step 90\n" in printed
    assert "rung    2 of 3: 3 points to step 30\n" in printed
    assert "[3/9] seed=9: at step 10 in 0 s, val loss 9.1000\n" in printed
    assert "        2.1000  seed=2: trains on\n        3.1000  seed=3: trains on\n" in printed
    assert "        5.1000  seed=5: stays\n" in printed
    assert "sweep sweeps/s: 1 done, 8 paused\nbest: seed=2, val loss 2.0111" in printed

    # The manifest has all points, none of them as removed; the command again has nothing to do.
    manifest = json.loads(Path("sweeps/s/manifest.json").read_text())
    assert [p["name"] for p in manifest["points"]] == [f"seed={seed}" for seed in seeds]
    assert not manifest.get("removed")
    before = trained()
    assert main([*ARGV, f"seed={','.join(map(str, seeds))}"]) == 0
    assert trained() == before
    assert "already at step 10, val loss 9.1000" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_point_that_was_stopped_goes_on_where_the_command_is_given_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*ARGV, "hydra.sweeper.first_step=30", "seed=1,2,13"]
    assert main(given) == 3
    assert trained() == ["1 30", "2 30", "13 30", "1 None"]
    assert states()["seed=1"] == ("stopped", 40)
    capsys.readouterr()
    # A failed point is tried again.
    assert main(given) == 1
    assert trained()[4:] == ["13 30", "1 None"]
    assert states() == {"seed=1": ("done", 90), "seed=2": ("paused", 30), "seed=13": ("failed", 0)}
    printed = capsys.readouterr().out
    assert "sweep sweeps/s: 1 done, 1 failed, 1 paused\nbest: seed=1" in printed
    assert "failed: seed=13: exit code 1" in printed


@pytest.mark.usefixtures("quick")
def test_without_a_loss_to_go_on_with_the_sweep_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGV, "seed=13,99"]) == 1
    printed = capsys.readouterr().out
    assert "no point has a validation loss to go on with\n" in printed
    assert states() == {"seed=13": ("failed", 0), "seed=99": ("paused", 30)}


@pytest.mark.usefixtures("quick")
def test_a_signal_at_the_end_of_a_rung_ends_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGV, "seed=15"]) == 0  # Alone it has no rung at which to pause.
    Path("trained").unlink()
    assert main([*ARGV, "name=t", "seed=15,16"]) == 3
    assert trained() == ["15 30"]
    assert "at sweeps/t/seed=16; run the same command to continue" in capsys.readouterr().err
    # It has paused, as seed=16 has then: no point was stopped, and none waits.
    assert main([*ARGV, "name=u", "seed=16,15"]) == 3
    assert trained()[1:] == ["16 30", "15 30"]
    assert "stopped: at sweeps/u; run the same command" in capsys.readouterr().err
    # A sweep that only pauses has nothing left to do.
    paused = [text for text in ARGV if "halving" not in text]
    assert main([*paused, "name=v", "seed=16,15", "trainer.stop_at=30"]) == 0


@pytest.mark.usefixtures("quick")
def test_a_step_without_a_checkpoint_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*ARGV, "hydra.sweeper.first_step=30", "seed=2,3"]
    assert main(given) == 0
    point = RunDir("sweeps/s/seed=3")
    # As a process writes it that is killed between a row and its next save.
    point.write_status(state="failed", step=35)
    (point.checkpoints / "step_00000030/files.json").unlink()
    before = trained()
    assert main(given) == 0
    assert trained() == [*before, "3 30"] and states()["seed=3"][0] == "paused"
    # One at that step is also left by a signal during the evaluation there.
    point.write_status(state="stopped", step=30)
    assert main(given) == 0
    assert trained() == [*before, "3 30", "3 30"] and states()["seed=3"] == ("paused", 30)
    # With a later one, the point has passed the rung.
    (point.checkpoints / "step_00000035").mkdir()
    (point.checkpoints / "step_00000035/files.json").write_text("{}")
    point.write_status(state="stopped", step=35)
    capsys.readouterr()
    assert main(given) == 0
    assert trained() == [*before, "3 30", "3 30"]
    assert "sweep sweeps/s: 1 done, 1 paused" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_point_that_was_killed_before_a_rung_is_out_until_it_is_tried_again() -> None:
    given = [*ARGV, "hydra.sweeper.first_step=30", "seed=14,2"]
    assert main(given) == 1
    assert states() == {"seed=14": ("failed", 35), "seed=2": ("done", 90)}
    assert main(given) == 0
    assert states() == {"seed=14": ("paused", 30), "seed=2": ("done", 90)}


@pytest.mark.usefixtures("quick")
def test_points_that_were_evaluated_at_other_steps_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = "seed=2,3,4,5,6,7,8,9,10"
    assert main([*ARGV, given]) == 0
    before = trained()
    others = [text for text in ARGV if not text.startswith("trainer.eval_interval")]
    assert main([*others, "trainer.eval_interval=4", given]) == 2
    error = capsys.readouterr().err
    assert "sweeps/s/seed=2: has trained past step 12 and has no validation loss there" in error
    assert trained() == before
    # As is a sweep that began without rungs and never evaluated there.
    whole = ["train", "-m", *others[3:], "name=w", "trainer.eval_interval=45", "seed=1,2"]
    assert main(whole) == 0
    assert main([*ARGV, "name=w", "seed=1,2"]) == 2
    assert "sweeps/w/seed=1: has trained past step 30" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_point_that_could_not_save_at_a_rung_is_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its loss is logged before it saves."""
    given = [*ARGV, "hydra.sweeper.first_step=30", "seed=13,2,3"]
    point = RunDir("sweeps/s/seed=13")
    assert main(given) == 1
    point.metrics_path.write_text('{"step": 30, "val/loss": 0.1}\n')
    capsys.readouterr()
    assert main(given) == 1
    printed = capsys.readouterr().out
    assert "        -       seed=13: out, without a validation loss here\n" in printed
    assert states()["seed=13"][0] == "failed" and states()["seed=2"] == ("done", 90)


@pytest.mark.usefixtures("quick")
def test_a_point_that_has_not_come_to_its_rung_halts_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = halving.resolve_states

    def cancelled(paths: list[Path]) -> list[RunState]:
        return [replace(state, state="cancelled") for state in real(paths)]

    monkeypatch.setattr(halving, "resolve_states", cancelled)
    assert main([*ARGV, "seed=13,2,3,4"]) == 3
    error = capsys.readouterr().err
    said = "before step 10 at sweeps/s/seed=13 (cancelled); run the same command to continue"
    assert said in error
    assert {step for _, step in states().values()} == {0, 10}


@pytest.mark.usefixtures("quick")
def test_the_points_that_were_left_out_are_not_resumed_unasked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*ARGV, "seed=2,3,4"]) == 0
    # The others have trained less: a mean with them would say nothing.
    assert main(["runs", "sweeps/s"]) == 0
    assert "means of the best" not in capsys.readouterr().out
    assert main(["resume", "sweeps/s"]) == 0
    assert "nothing to do; --only paused trains 2 to the end" in capsys.readouterr().out
    assert main(["resume", "sweeps/s", "--only", "pausd"]) == 2
    assert "did you mean paused?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("points", "keys", "rungs"),
    [
        (9, {}, [(9, 10), (3, 30), (1, 90)]),
        (10, {}, [(10, 5), (4, 10), (2, 30), (1, 90)]),
        (4, {"factor": 2}, [(4, 25), (2, 45), (1, 90)]),
        (4, {"factor": 4}, [(4, 25), (1, 90)]),
        (2, {}, [(2, 30), (1, 90)]),
        (1, {}, [(1, 90)]),
        (9, {"first_step": 7}, [(9, 10), (3, 25), (1, 90)]),
        (27, {"first_step": 45}, [(27, 45), (9, 90)]),
        # Rungs are evaluations, and each is later than the one before.
        (100, {"factor": 2, "first_step": 1}, [
            (100, 5), (50, 10), (25, 15), (13, 20), (7, 25), (4, 35), (2, 65), (1, 90),
        ]),
    ],
)  # fmt: skip
def test_rungs_are_a_factor_apart_at_steps_that_are_evaluated(
    tiny: Callable[..., Any], points: int, keys: dict[str, int], rungs: list[tuple[int, int]]
) -> None:
    cfg = tiny("trainer.max_steps=90", "trainer.eval_interval=5")
    made = [Point(str(i), [], cfg, Path(str(i))) for i in range(points)]
    sweeper = OmegaConf.create({"factor": 3, "first_step": None} | keys)
    planned = plan_rungs(made, sweeper)
    assert planned == [Rung(*rung) for rung in rungs]
    assert in_words(planned).startswith(f"{points} point{'s' * (points > 1)} to step ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.sweeper.factor=1"], "hydra.sweeper.factor=1: must be a whole number of at least"),
        (["hydra.sweeper.factor=2.5"], "hydra.sweeper.factor=2.5: must be a whole number"),
        (["hydra.sweeper.first_step=90"], "hydra.sweeper.first_step=90: must be at least 1 and "),
        (["hydra.sweeper.first_step=0"], "hydra.sweeper.first_step=0: must be at least 1 and le"),
        (["trainer.max_steps=60,90"], "trainer.max_steps=60,90: hydra/sweeper=halving compares "),
        (["trainer.eval_interval=5,null"], "trainer.eval_interval=5,null: hydra/sweeper=halving"),
        (["trainer.eval_interval=null"], "trainer.eval_interval=null: hydra/sweeper=halving com"),
        (["trainer.eval_interval=90"], "trainer.eval_interval=90: hydra/sweeper=halving compar"),
        (["trainer.stop_at=10"], "trainer.stop_at=10: hydra/sweeper=halving chooses the steps"),
        (
            ["hydra.sweeper.first_step=86"],
            "hydra/sweeper=halving: from hydra.sweeper.first_step=86 on",
        ),
        (["launch=slurm", "--dry-run"], "launch.wait=false, launch.dry_run=false: hydra/sweeper="),
        (["launch=slurm"], "launch.wait=false, launch.dry_run=false: hydra/sweeper=halving choos"),
        (["hydra/launcher=basic"], "hydra/sweeper=halving: goes with the launchers of this pack"),
        (["hydra.sweeper.facto=2"], "hydra.sweeper.facto"),
        (["moe.n_experts=3,8"], "point seed=1,moe.n_experts=3: "),
    ],
)
def test_what_cannot_be_halved_is_refused(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {text.partition("=")[0] for text in overrides}
    given = [text for text in ARGV if text.partition("=")[0] not in keys]
    if "moe.n_experts" in keys:
        given.append("moe.n_experts_per_token=4")
    assert main([*given, "seed=1,2", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and "Traceback" not in error
    assert not Path("sweeps").exists()


def test_a_dry_run_lists_the_points_and_the_rungs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGV, "--zip", "seed=1,2,3", "trainer.batch_size=2,4,8", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "sweep sweeps/s: 3 points" in printed
    assert "halving: 3 points to step 30, 1 point to step 90" in printed
    assert not Path("sweeps").exists()


@pytest.mark.slow
def test_points_that_trained_on_equal_points_that_never_paused(tiny: Callable[..., Any]) -> None:
    cfg = tiny()
    keys = [f"model.{name}={getattr(cfg.model, name)}" for name in (
        "d_model", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "multiple_of",
    )]  # fmt: skip
    keys += [f"trainer.{name}={getattr(cfg.trainer, name)}" for name in (
        "max_steps", "batch_size", "log_interval", "eval_steps", "device",
    )]  # fmt: skip
    given = ["train", "-m", *keys, "data=synthetic", "data.n_tokens=20000", "data.vocab_size=64",
             "moe.n_experts=4", "trainer.eval_interval=2", "seed=1,2"]  # fmt: skip
    assert main([*given, "name=whole"]) == 0
    halved = "hydra/sweeper=halving"
    assert main([*given, "name=parts", halved, "hydra.sweeper.first_step=4"]) == 0
    ended = {seed: RunDir(f"sweeps/parts/seed={seed}").read_status() for seed in (1, 2)}
    assert sorted((s["state"], s["step"]) for s in ended.values()) == [("done", 8), ("paused", 4)]
    assert main(["resume", "sweeps/parts", "--only", "paused"]) == 0
    for seed in (1, 2):
        rows = [
            [
                {k: v for k, v in row.items() if not k.startswith("perf/")}
                for row in read_rows(RunDir(f"sweeps/{name}/seed={seed}").metrics_path)
            ]
            for name in ("whole", "parts")
        ]
        assert rows[0] == rows[1] and rows[0][-1]["step"] == 8
