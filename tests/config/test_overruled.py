"""An experiment that wins over an option named next to it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.config.compose import Composer
from lunaris.config.overruled import overruled
from lunaris.launch.sweep.points import Sweep

_MODEL = "experiment=smoke sets model.d_model=32, model.n_layers=2, model.n_heads=2 and "


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=smoke"], []),
        (["model=base"], []),
        (["experiment=smoke", "moe=top2", "data=text", "seed=3"], []),
        (["experiment=smoke", "model=base"], [f"{_MODEL}3 more keys over model=base"]),
        (["model=base", "experiment=smoke"], [f"{_MODEL}3 more keys over model=base"]),
        # A key of the command line is the last word, and not the experiment's.
        (
            ["experiment=smoke", "model=base", "model.d_model=64", "model.n_layers=2"],
            ["experiment=smoke sets model.n_heads=2, model.n_kv_heads=1, model.max_seq_len=32 and"],
        ),
        (["experiment=smoke", "schedule=wsd", "trainer=default"], [" over trainer=default"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_an_experiment_wins_over_is_named(overrides: list[str], said: list[str]) -> None:
    found = overruled(Composer(), [overrides])
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


def test_the_commands_warn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=smoke", "model=base"]) == 0
    assert f"warning: {_MODEL}" in capsys.readouterr().err
    sweep = ["train", "-m", "experiment=smoke", "--dry-run"]
    assert main([*sweep, "model=base", "seed=1,2"]) == 0
    assert capsys.readouterr().err.count(f"warning: {_MODEL}") == 1
    # The warning says why these points are the same.
    assert main([*sweep, "model=base,small", "seed=1,2"]) == 2
    error = capsys.readouterr().err
    assert error.count(f"warning: {_MODEL}") == 2
    assert "points model=base,seed=1 and model=small,seed=1: two points of the sweep" in error


def test_two_points_of_one_config_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-m", "data=synthetic", "trainer.max_steps=100,1e2", "--dry-run"]
    assert main(command) == 2
    assert (
        "points trainer.max_steps=100 and trainer.max_steps=100.0: two points of the sweep have "
        "the same config"
    ) in capsys.readouterr().err


def test_a_sweep_that_is_planned_in_parts_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [["experiment=smoke", "model=base", f"seed={seed}"] for seed in range(3)]
    sweep = Sweep(Path("sweeps/s"), "lunaris train -m …", set(lines[0][:2]))
    # As for many points: the first one alone, then all.
    sweep.plan(lines[:1])
    assert len(sweep.plan(lines)) == 3
    assert capsys.readouterr().err.count("warning: ") == 1
