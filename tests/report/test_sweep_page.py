"""The page of a sweep: its points by loss, seeds together, curves, and what each key did."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.report.sweep_page import number
from lunaris.runs.sweep_manifest import ManifestPoint, write_points

HOSTILE = '<img src=x onerror="alert(1)">'


def rows(loss: float) -> list[dict[str, Any]]:
    return [
        {"step": 0, "val/loss": 6.0},
        {"step": 4, "train/main_loss": loss + 0.5, "val/loss": loss, "perf/tokens_per_s": 10.0},
        {"step": 8, "train/main_loss": loss, "val/loss": loss + 0.25},
    ]


@pytest.fixture
def sweep(make_run: Callable[..., Path]) -> Path:
    """Three numbers of experts, two rates, two seeds; one point failed, one was never started."""
    points = []
    for experts in (2, 8, 64):
        for rate in ("1e-3", "1e-1"):
            for seed in (1, 2):
                name = f"n{experts},{rate},{seed}"
                swept = [
                    f"moe.n_experts={experts}", f"optimizer.learning_rate={rate}", f"seed={seed}",
                ]  # fmt: skip
                overrides = ["data=synthetic", "out_dir=sweeps/s", *swept]
                points.append(ManifestPoint(name, overrides, name))
                loss = 4.0 + experts / 100 + 10 * float(rate) + seed / 100
                state = "failed" if (experts, rate, seed) == (64, "1e-1", 2) else "done"
                found = rows(loss) if state == "done" else []
                told = {"last_error": f"Boom: {HOSTILE}"} if state == "failed" else {}
                make_run(f"sweeps/s/{name}", found, state=state, **told)
    write_points(Path("sweeps/s"), "lunaris train -m moe.n_experts=2,8,64 …", points)
    shutil.rmtree("sweeps/s/n2,1e-1,1")
    return Path("sweeps/s")


def test_points_are_ranked_by_their_best_validation(
    sweep: Path, report_of: Callable[..., Any]
) -> None:
    page = report_of(str(sweep))
    table = page.tables[0]
    assert table[0] == [
        "rank", "n_experts", "learning_rate", "seed", "state", "step", "best val loss",
        "last val loss", "last train loss", "tokens/s", "point",
    ]  # fmt: skip
    assert table[1] == [
        "1", "2", "1e-3", "1", "done", "8", "4.0400", "4.2900", "4.0400", "10", "n2,1e-3,1",
    ]  # fmt: skip
    losses = [float(row[6]) for row in table[1:] if row[6] != "–"]
    assert losses == sorted(losses) and len(losses) == 10
    assert [row[4] for row in table[11:]] == ["missing", "failed"]
    text = " ".join(page.text.split())
    # The command makes a run of its own, not the point again.
    command = "lunaris train data=synthetic moe.n_experts=2 optimizer.learning_rate=1e-3 seed=1"
    assert command in text and "lunaris train -m moe.n_experts=2,8,64" in text
    assert f"n64,1e-1,2: Boom: {HOSTILE}" in text and "n2,1e-1,1: missing" in text
    assert "10 done" in text


def test_seeds_are_joined(sweep: Path, report_of: Callable[..., Any]) -> None:
    head, first, *others = report_of(str(sweep)).tables[1]
    assert head == ["n_experts", "learning_rate", "seeds", "mean", "spread"]
    assert first == ["2", "1e-3", "2", "4.0450", f"{stdev([0.01, 0.02]):.4f}"]
    assert {tuple(row[:3]) for row in others} == {
        ("8", "1e-3", "2"), ("64", "1e-3", "2"),
        ("2", "1e-1", "1"), ("8", "1e-1", "2"), ("64", "1e-1", "1"),
    }  # fmt: skip
    assert all(row[4] == "–" for row in others if row[2] == "1")


def test_curves_and_keys_are_drawn(sweep: Path, report_of: Callable[..., Any]) -> None:
    page = report_of(str(sweep))
    points = page.points("curves-val-loss", "n2,1e-3,1")
    assert [(step, round(loss, 9)) for step, loss in points] == [(0, 6.0), (4, 4.04), (8, 4.29)]
    traces = page.figures["curves-val-loss"]["views"][0]["traces"]
    widths = [trace["line"]["width"] for trace in traces]
    assert len(traces) == 10 and max(widths) == widths[-1] > max(widths[:-1])
    assert traces[-1]["name"] == "n2,1e-3,1"
    experts, mean = page.trace("key-0", "point"), page.trace("key-0", "mean")
    assert sorted(set(experts["x"])) == mean["x"] == [2, 8, 64]
    assert len(experts["y"]) == 10
    assert page.figures["key-0"]["layout"]["xaxis"]["type"] == "log"
    (lines,) = page.figures["parallel"]["views"][0]["traces"]
    assert [d["label"] for d in lines["dimensions"]] == ["n_experts", "learning_rate", "val loss"]
    assert lines["dimensions"][0]["ticktext"] == ["2", "8", "64"]
    assert len(lines["line"]["color"]) == 10


def test_options_are_categories(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    points = [ManifestPoint(moe, [f"moe={moe}"], moe) for moe in ("none", "top2")]
    for i, point in enumerate(points):
        make_run(f"sw/{point.name}", rows(4 + i))
    write_points(Path("sw"), "lunaris train -m moe=none,top2", points)
    page = report_of("sw", to="page.html")
    axis = page.figures["key-0"]["layout"]["xaxis"]
    assert axis["type"] == "category" and axis["categoryarray"] == ["none", "top2"]
    assert "parallel" not in page.figures
    assert len(page.tables) == 1


def test_a_sweep_without_a_number_has_a_page(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    make_run("sw/a", [], state="failed", last_error="Boom")
    write_points(Path("sw"), "lunaris train -m seed=1", [ManifestPoint("a", ["seed=1"], "a")])
    page = report_of("sw")
    assert page.figures == {} and "a: Boom" in " ".join(page.text.split())
    assert main(["report", "sw", "sw/a"]) == 2


def test_pictures_of_a_sweep(sweep: Path) -> None:
    assert main(["report", str(sweep), "--png", "pictures"]) == 0
    names = {path.name for path in Path("pictures").iterdir()}
    assert {"curves-val-loss.png", "key-0.png", "key-1.png"} <= names


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("8", 8), ("top2", None), ("inf", None), (None, None)]
)
def test_a_value_may_be_a_number(text: str | None, value: float | None) -> None:
    assert number(text) == value


def test_values_drawn_at_random_have_few_ticks_and_no_line_of_noise(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    rates = [f"{rate}e-5" for rate in range(100, 130)]
    points = [
        ManifestPoint(
            rate,
            [f"optimizer.learning_rate={rate}", f"seed={i % 2}", f"moe={['none', 'top2'][i % 2]}"],
            rate,
        )
        for i, rate in enumerate(rates)
    ]
    for i, point in enumerate(points):
        make_run(f"sw/{point.name}", rows(4 + i))
    write_points(Path("sw"), "lunaris train -m …", points)
    page = report_of("sw")
    assert len(page.tables) == 1  # No point has another one of another seed.
    names = [[t["name"] for t in page.figures[f"key-{i}"]["views"][0]["traces"]] for i in (0, 1)]
    assert names == [["point"], ["point", "mean"]]
    (lines,) = page.figures["parallel"]["views"][0]["traces"]
    shown = lines["dimensions"][0]["ticktext"]
    assert len(shown) == 12 and [shown[0], shown[-1]] == [rates[0], rates[-1]]
