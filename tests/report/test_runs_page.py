"""The page of several runs: their numbers, what differs between them, and their curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.runs.run_dir import RunDir
from lunaris.runs.sweep_manifest import ManifestPoint, write_points

HOSTILE = '</script><img src=x onerror="alert(1)">'


def rows(loss: float, sequences: int = 8) -> list[dict[str, Any]]:
    """Return rows of a run that reads `sequences` sequences of 16 tokens in two steps."""
    return [
        {"step": 0, "val/loss": 6.0},
        {"step": 2, "train/main_loss": loss + 1, "train/sequences": sequences, "train/lr": 1e-3,
         "perf/tokens_per_s": 100.0, "train/grad_norm": 0.5},
        {"step": 3, "val/loss": loss},
        {"step": 4, "train/main_loss": loss, "train/sequences": 2 * sequences, "train/lr": 1e-4,
         "perf/tokens_per_s": 300.0, "train/grad_norm": 0.25, "train/skipped_steps": 3,
         "val/loss": loss + 0.5},
    ]  # fmt: skip


@pytest.fixture
def pair(make_run: Callable[..., Path]) -> list[str]:
    """Two runs that differ in their learning rate and batch."""
    one = make_run("runs/a", rows(4.0), parameters=1200, active_parameters=400, attempts=3)
    two = make_run("runs/b", rows(3.0, 16), state="running", step=4, tokens=512)
    config = (two / "config.yaml").read_text()
    config = config.replace("0.001", "0.01").replace("name: x", "name: y")
    (two / "config.yaml").write_text(config)
    attempts = [{"time": 10.0, "ended": 75.0}, {"time": 100.0, "ended": 125.0}]
    RunDir(one).note(command="lunaris train seed=2 name=x", attempts=attempts)
    change = {
        "step": 2, "keys": {"optimizer.learning_rate": {"old": 0.001, "new": 0.01}}, "config": {},
        "command": "lunaris resume runs/b optimizer.learning_rate=0.01", "data": None, "time": 1.0,
    }  # fmt: skip
    (two / "changes.jsonl").write_text(json.dumps(change) + "\n")
    return [str(one), str(two)]


def test_a_row_is_a_run(pair: list[str], report_of: Callable[..., Any]) -> None:
    head, *found = report_of(*pair, to="both.html").tables[0]
    assert head == [
        "run", "state", "best val loss", "last val loss", "last train loss", "step", "tokens",
        "time", "tokens/s", "parameters", "active", "skipped", "restarts",
    ]  # fmt: skip
    assert found == [
        ["a", "done", "4.0000", "4.5000", "4.0000", "8", "256", "0:01:30", "200", "1,200", "400",
         "3", "2"],
        ["b", "running", "3.0000", "3.5000", "3.0000", "4", "512", "–", "200", "–", "–", "3", "0"],
    ]  # fmt: skip
    assert not Path("report.html").exists()
    assert main(["report", *pair]) == 0 and Path("report.html").is_file()


def test_only_the_keys_that_differ_are_shown(
    pair: list[str], report_of: Callable[..., Any]
) -> None:
    page = report_of(*pair, to="both.html")
    assert page.tables[1] == [["key", "a", "b"], ["optimizer.learning_rate", "0.001", "0.01"]]
    config, same = Path("runs/b/config.yaml"), Path("runs/a/config.yaml").read_text()
    config.write_text(same.replace("grad_clip: 1.0", "extra: null"))
    assert report_of(*pair, to="both.html").tables[1][1:] == [
        ["trainer.grad_clip", "1.0", "–"], ["trainer.extra", "–", "null"],
    ]  # fmt: skip
    config.write_text(same)
    page = report_of(*pair, to="both.html")
    assert len(page.tables) == 1 and "No key differs." in page.text


def test_keys_that_only_one_kind_of_component_has_are_folded(
    pair: list[str], report_of: Callable[..., Any]
) -> None:
    config = Path("runs/b/config.yaml")
    given = config.read_text()
    for run, text in (("a", "_target_: x.Dense"), ("b", "_target_: x.MoE\n  n_experts: 8")):
        Path(f"runs/{run}/config.yaml").write_text(f"{given}\nmoe:\n  {text}\n")
    assert report_of(*pair, to="both.html").tables[1][1:] == [["moe._target_", "x.Dense", "x.MoE"]]
    shutil.copytree("runs/b", "runs/c")
    eight = config.read_text()
    Path("runs/c/config.yaml").write_text(eight.replace("n_experts: 8", "n_experts: 4"))
    assert report_of(*pair, "runs/c", to="both.html").tables[1][1:] == [
        ["moe._target_", "x.Dense", "x.MoE", "x.MoE"],
        ["moe.n_experts", "–", "8", "4"],
    ]


def test_long_names_get_letters(pair: list[str], report_of: Callable[..., Any]) -> None:
    long = "moe.n_experts=16,optimizer.learning_rate=0.003"
    shutil.copytree("runs/b", f"runs/{long}")
    page = report_of("runs/a", f"runs/{long}", to="both.html")
    assert [row[:2] for row in page.tables[0]] == [["", "run"], ["A", "a"], ["B", long]]
    assert page.tables[1][0] == ["key", "A", "B"]
    assert page.trace("runs-val-loss", "B")["name"] == "B"
    assert "B: 3 steps were skipped" in page.text


def test_curves_are_over_steps_and_tokens(pair: list[str], report_of: Callable[..., Any]) -> None:
    page = report_of(*pair, to="both.html")
    assert list(page.figures) == [
        "runs-train-main_loss", "runs-val-loss", "runs-train-lr", "runs-train-grad_norm",
        "runs-perf-tokens_per_s",
    ]  # fmt: skip
    for name, tokens in (("a", [0, 192, 256]), ("b", [0, 384, 512])):
        steps = page.trace("runs-val-loss", name)
        assert steps["x"] == [0, 3, 4]
        # Step 3 has no row of its own with sequences: it lies between those of 2 and 4.
        over_tokens = page.trace("runs-val-loss", name, view=1)
        assert over_tokens["x"] == tokens and over_tokens["y"] == steps["y"]
    views = page.figures["runs-val-loss"]["views"]
    assert [(view["label"], view["x"]) for view in views] == [("steps", ""), ("tokens", "tokens")]
    colors = {
        (name, page.trace(chart, name)["color"]) for chart in page.figures for name in ("a", "b")
    }
    assert colors == {("a", 0), ("b", 1)}


def test_commands_and_warnings_name_their_run(
    pair: list[str], report_of: Callable[..., Any]
) -> None:
    RunDir("runs/a").note(data={"main": "1"})
    RunDir("runs/b").note(data={"main": "2"})
    text = " ".join(report_of(*pair, to="both.html").text.split())
    assert "lunaris train seed=2 name=x" in text
    assert "lunaris train lunaris resume runs/b optimizer.learning_rate=0.01" in text
    assert "a: The validation loss rose from 4.0000 at step 3 to 4.5000." in text
    assert "b: 3 steps were skipped" in text
    assert "The runs read different training data" in text
    RunDir("runs/b").note(data={"main": "1"})
    assert "different training data" not in report_of(*pair, to="both.html").text


def test_points_of_sweeps_may_be_compared(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    for sweep in ("s", "t"):
        folder = make_run(f"sweeps/{sweep}/p", rows(4.0))
        given = ["data=synthetic", "out_dir=sweeps/x/p", "name=p", "logger.a=1", f"seed={sweep}"]
        RunDir(folder).note(command="lunaris train -m seed=1,2", overrides=given)
        write_points(Path(f"sweeps/{sweep}"), "lunaris train -m", [ManifestPoint("p", given, "p")])
    page = report_of("sweeps/s/p", "sweeps/t/p", to="both.html")
    assert [row[0] for row in page.tables[0][1:]] == ["sweeps/s/p", "sweeps/t/p"]
    # The text of the button that copies it follows.
    assert "lunaris train data=synthetic logger.a=1 seed=scopy" in page.text
    assert main(["report", "sweeps/s/p", "sweeps/t"]) == 2


def test_little_is_enough_and_is_text(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    empty = make_run("runs/empty", [], config="", state="failed", last_error=HOSTILE)
    for name in ("provenance.json", "status.json"):
        row = {"step": 1, "val/loss": None}
        (make_run(f"runs/{name}", [row], config="a: [") / name).unlink()
    page = report_of(str(empty), "runs/provenance.json", "runs/status.json", to="three.html")
    assert page.figures == {} and len(page.tables[0]) == 4
    assert f"empty: The run is failed at step 8 of 8: {HOSTILE}" in " ".join(page.text.split())
    assert "img" not in {tag for tag, _ in page.elements}


def test_many_runs_are_coloured_by_their_place(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    folders = [str(make_run(f"runs/{i}", rows(4.0 + i))) for i in range(9)]
    page = report_of(*folders, to="nine.html")
    colors = [page.trace("runs-val-loss", str(i))["color"] for i in range(9)]
    assert colors == sorted(set(colors)) and all(isinstance(c, float) for c in colors)
    assert page.figures["runs-val-loss"]["layout"]["showlegend"] is False


def test_pictures_of_several_runs(pair: list[str]) -> None:
    assert main(["report", *pair, "--to", "both.html", "--png", "pictures"]) == 0
    assert {path.name for path in Path("pictures").iterdir()} == {
        "runs-train-main_loss.png", "runs-val-loss.png", "runs-train-lr.png",
        "runs-train-grad_norm.png", "runs-perf-tokens_per_s.png",
    }  # fmt: skip


def test_a_real_run_says_its_parameters(
    finished: RunDir, report_of: Callable[..., Any], make_run: Callable[..., Path]
) -> None:
    make_run("runs/other", [])
    row = report_of(str(finished.path), "runs/other", to="both.html").tables[0][1]
    total, active = (int(text.replace(",", "")) for text in row[9:11])
    assert total > active > 0
    assert str(total) == str(finished.read_status()["parameters"])
