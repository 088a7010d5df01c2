"""Keys of a sweep that are paired by --zip, alone and times other keys."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.config.overrides import parse
from lunaris.launch.sweep.expand import expand
from lunaris.launch.sweep.points import Outcome, Point, Sweep
from lunaris.launch.sweep.run_points import LocalPoints
from lunaris.runs.sweep_manifest import read_manifest

ARGV = ["train", "-m", "data=synthetic", "name=s", "parallelism=ddp", "launch=slurm"]
TWO = ["moe.n_experts=8,64", "launch.nodes=1,4"]


def test_all_swept_keys_are_paired_where_none_is_named() -> None:
    assert expand(parse(["seed=7", "moe=none,top2", "model.n_layers=1,2"]), [""]) == [
        ["seed=7", "moe=none", "model.n_layers=1"],
        ["seed=7", "moe=top2", "model.n_layers=2"],
    ]


def test_named_keys_are_paired_and_the_others_multiplied() -> None:
    """The order is that of the product, and that of a point's overrides the command line's."""
    points = expand(parse(["a=1,2", "b=range(3,5)", "c=5,6", "d=7,8", "e=9"]), ["d,a", "c,b"])
    assert points == [
        [f"a={a}", f"b={b}", f"c={c}", f"d={d}", "e=9"]
        for a, d in ((1, 7), (2, 8))
        for b, c in ((3, 5), (4, 6))
    ]


@pytest.mark.parametrize("zipped", [["--zip"], ["--zip", "moe.n_experts,launch.nodes"]])
@pytest.mark.parametrize("last", [False, True])
def test_the_flag_may_stand_before_and_after_the_overrides(
    zipped: list[str], last: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*ARGV, *TWO, *zipped] if last else [*ARGV, *zipped, *TWO]
    assert main([*argv, "--dry-run"]) == 0
    title, heads, *points = capsys.readouterr().out.splitlines()
    assert title.startswith("sweep sweeps/s: 2 points;")
    assert heads.split()[3:] == ["n_experts", "nodes"]
    assert [line.split()[3:] for line in points] == [["8", "1"], ["64", "4"]]
    assert not os.listdir()


def test_paired_resources_are_one_array_each(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGV, *TWO, "--zip", "moe.n_experts,launch.nodes", "seed=1,2,3"]
    assert main([*argv, "launch.dry_run=true"]) == 0
    script = capsys.readouterr().out
    assert re.findall(r"#SBATCH --nodes=(\d+)", script) == ["1", "4"]
    assert re.findall(r"#SBATCH --array=(\S+)%", script) == ["0-2", "0-2"]
    assert not os.listdir()


def test_the_manifest_holds_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(self: LocalPoints, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        sweep.freeze(points)
        return [Outcome(point, "done") for point in points]

    monkeypatch.setattr(LocalPoints, "submit", submit)
    argv = ["train", "-m", "--zip", "data=synthetic", "name=s", "moe.n_experts=4,8", "seed=1,2"]
    assert main(argv) == 0
    manifest = read_manifest(Path("sweeps/s"))
    assert [p.name for p in manifest.points] == ["moe.n_experts=4,seed=1", "moe.n_experts=8,seed=2"]
    assert manifest.command.startswith("lunaris train -m --zip data=synthetic ")
    # A product of the same keys is the same sweep: it adds the points that are not there yet.
    assert main([text for text in argv if text != "--zip"]) == 0
    assert len(read_manifest(Path("sweeps/s")).points) == 4


def test_another_launcher_gets_the_pairs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    seen: list[list[str]] = []

    def launch(self: object, job_overrides: list[list[str]], initial_job_idx: int) -> list[object]:
        seen.extend(job_overrides)
        return []

    monkeypatch.setattr(BasicLauncher, "launch", launch)
    argv = ["train", "-m", "--zip", "data=synthetic", "name=s", "moe.n_experts=4,8", "seed=1,2"]
    assert main([*argv, "hydra/launcher=basic"]) == 0
    assert [point[-2:] for point in seen] == [
        ["moe.n_experts=4", "seed=1"],
        ["moe.n_experts=8", "seed=2"],
    ]


def test_a_plan_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "-m", "--zip", "data=synthetic", "moe.n_experts=4,8", "model.n_layers=2,3"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "moe.n_experts=8,model.n_layers=3" in shown and "\n2 points" in shown


THREE = [*TWO, "seed=1,2,3"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--zip", *THREE],
            "paired keys need the same number of values, but moe.n_experts has 2, launch.nodes "
            "has 2, seed has 3",
        ),
        (["--zip", "seed,launch.nodes", *THREE], "but seed has 3, launch.nodes has 2"),
        (
            ["--zip", "moe.n_expert,seed", *THREE],
            "--zip moe.n_expert,seed: moe.n_expert is not swept (KEY=A,B,C); swept: "
            "moe.n_experts, launch.nodes, seed; did you mean moe.n_experts?",
        ),
        (["--zip", "name,seed", *THREE], "--zip name,seed: name is not swept"),
        (["--zip", "seed,", *THREE], "--zip seed,: an empty name is not swept"),
        (["--zip", "seed", *THREE], "--zip seed: name two or more keys to pair"),
        (["--zip", "seed,seed", *THREE], "--zip seed,seed: seed is named more than once"),
        (
            ["--zip", "moe.n_experts,launch.nodes", "--zip", "seed,launch.nodes", *THREE],
            "launch.nodes is named more than once",
        ),
        (
            [*TWO, "--zip", "moe.n_experts,launch.nodes", "--zip"],
            "--zip: without names it pairs all swept keys",
        ),
        (["--zip", "seed=1,2"], "--zip: pairs two or more swept keys (KEY=A,B,C); swept: seed"),
        (["--zip", "seed=1"], "--zip: pairs two or more swept keys (KEY=A,B,C); no key is swept"),
        (["--zip", *TWO, "hydra/sweeper=basic"], "--zip: goes with hydra/sweeper=lunaris"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_keys_that_cannot_be_paired_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGV, *given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1 and "Traceback" not in said
    assert not os.listdir()


def test_one_run_has_nothing_to_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--zip", "seed=1"]) == 2
    assert "--zip: goes with -m" in capsys.readouterr().err
