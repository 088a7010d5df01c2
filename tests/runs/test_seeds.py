"""Points of a sweep joined over their seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lunaris.runs.seeds import by_seed, compared
from lunaris.runs.table import best_rows, tables


def test_points_that_differ_in_nothing_but_the_seed_are_joined_the_lowest_mean_first() -> None:
    a, b, c = by_seed(
        [
            ({"moe": "top2", "seed": "1"}, 3.0),
            ({"moe": "none", "seed": "1"}, 1.0),
            ({"moe": "top2", "seed": "2"}, 5.0),
            ({"moe": "none", "seed": "2"}, 2.0),
            ({"moe": "none", "seed": "3"}, None),
            ({"moe": "none", "seed": "4"}, math.nan),
            ({"moe": "switch", "seed": "1"}, 9.0),
            ({"moe": "lost", "seed": "1"}, None),
        ]
    )
    assert (a.values, a.losses, a.mean) == ({"moe": "none"}, [1.0, 2.0], 1.5)
    assert a.spread == pytest.approx(math.sqrt(0.5))
    assert (b.values, b.mean, b.spread) == ({"moe": "top2"}, 4.0, pytest.approx(math.sqrt(2)))
    assert (c.values, c.mean, c.spread) == ({"moe": "switch"}, 9.0, None)


def row(sweep: str | None, loss: float | None, **values: str) -> dict[str, Any]:
    return {
        "name": "x", "sweep": sweep, "values": values, "overrides": [], "state": "done",
        "step": 2, "max_steps": 2, "final_train_loss": None, "best_val_loss": loss,
        "duration_s": None, "job_id": None, "remark": None, "changes": [], "parents": [],
        "logs": [], "prepared": None, "failures": 0, "last_failure": None, "excluded": {},
    }  # fmt: skip


def test_the_means_stand_below_the_sweep_they_are_of() -> None:
    rows = [
        row("sweeps/a", 1.0, moe="top2", seed="1"),
        row("sweeps/a", 2.0, moe="top2", seed="2"),
        row("sweeps/a", None, moe="none", seed="1"),
        row("sweeps/a", 4.0, moe="none", seed="2"),
        row("sweeps/b", 1.0, seed="1"),
        row("sweeps/b", 1.0, seed="2"),
        row(None, 1.0, seed="1"),
        row(None, 2.0, seed="2"),
        row("sweeps/c", 1.0, moe="top2", seed="1"),
        row("sweeps/c", 1.0, moe="none", seed="2"),
        row("sweeps/d", 1.0, moe="top2"),
        row("sweeps/d", 1.0, moe="none"),
    ]
    shown = tables(rows)
    means = "means of the best validation losses over the seeds of"
    titles = [table.title.partition(":")[0] for table in shown]
    assert titles == [
        "sweep sweeps/a", f"{means} sweeps/a", "sweep sweeps/b", f"{means} sweeps/b", "",
        "sweep sweeps/c", "sweep sweeps/d",
    ]  # fmt: skip
    assert shown[1].heads == ["moe", "seeds", "mean", "spread"]
    assert shown[1].rows == [["top2", "2", "1.5000", "0.7071"], ["none", "1", "4.0000", "-"]]
    assert (shown[3].heads, shown[3].rows) == (
        ["seeds", "mean", "spread"],
        [["2", "1.0000", "0.0000"]],
    )
    assert len(tables(best_rows(rows[:4]))) == 1


@pytest.mark.parametrize("width", [30, 200])
def test_a_terminal_shows_the_means(width: int) -> None:
    from rich.console import Console

    from lunaris.runs.show import for_terminal

    console = Console(width=width)
    rows = [row("s", float(i), moe="top2,switch,none", seed=str(i)) for i in (1, 2)]
    with console.capture() as captured:
        for part in for_terminal(tables(rows)[1:], width):
            console.print(part)
    shown = captured.get()
    assert "1.5000" in shown and "0.7071" in shown


def test_a_point_that_paused_before_others_went_on_is_not_compared() -> None:
    assert compared([("done", 9), ("paused", 3), ("running", 5)]) == [True, False, True]
    assert compared([("paused", 3), ("paused", 3), ("failed", 2)]) == [True, True, True]
    assert compared([("paused", 3), ("paused", 9)]) == [False, True]
    assert compared([]) == []
