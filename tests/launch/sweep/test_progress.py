"""What a person sees of the points that run: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from lunaris.launch.sweep import progress
from lunaris.launch.sweep.points import Point
from lunaris.launch.sweep.progress import SweepProgress
from lunaris.runs.create import create


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def points(tiny: Callable[..., Any]) -> list[Point]:
    made = []
    names = ("seed=1", "seed=2", "moe.n_experts=8,optimizer.learning_rate=0.0003,schedule=wsd")
    for i, name in enumerate(names):
        cfg = tiny("trainer.max_steps=100", name=f"p{i}")
        made.append(Point(name, [], cfg, create(cfg, "test", []).path))
    return made


def log(point: Point, step: int, loss: float) -> None:
    with (point.dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "train/loss": loss}) + "\n")


def last_table(screen: Any) -> list[str]:
    """Return the lines of the table that was drawn last, without colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain[plain.rindex("point") :])]
    return [line for line in lines if line]


def test_a_terminal_has_a_table_of_the_running_points(
    points: list[Point], on_terminal: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, clock = on_terminal(60), Clock(monkeypatch)
    log(points[1], 40, 9.0)  # Of an earlier attempt.
    shown = SweepProgress(points)
    with shown:
        shown.began(points[0])
        shown.began(points[1])
        shown.draw("1 more to start")
        heads, first, second, note = last_table(screen)
        assert heads.split() == ["point", "step", "loss", "left"]
        assert first.split() == ["[1/3]", "seed=1", "0/100"]
        assert second.split() == ["[2/3]", "seed=2", "40/100", "9.0000"]
        assert note == "1 more to start"

        # It continues from the checkpoint of step 20, in which its rows are cut.
        (points[1].dir / "metrics.jsonl").unlink()
        log(points[0], 10, 3.5)
        log(points[1], 20, 4.0)
        clock.now += 5
        shown.draw("1 more to start")
        log(points[0], 30, 3.25)
        log(points[1], 60, 2.0)
        clock.now += 10
        shown.draw("1 more to start")
        _, first, second, _ = last_table(screen)
        # Two steps a second, then four.
        assert first.split()[2:] == ["30/100", "3.2500", "0:35"]
        assert second.split()[2:] == ["60/100", "2.0000", "0:10"]

        clock.now += 0.5
        log(points[0], 31, 1.0)
        before = screen.getvalue()
        shown.draw("1 more to start")
        assert screen.getvalue() == before  # Drawn once a second.
        shown.draw("SIGTERM: saving after this step")
        assert "31/100" in last_table(screen)[1]
        assert last_table(screen)[-1] == "SIGTERM: saving after this step"

        shown.ended(points[0], "done in 3 s, val loss 1.0000")
        shown.began(points[2])
        shown.draw("")
        *_, second, third = last_table(screen)
        assert "[1/3] seed=1: done in 3 s, val loss 1.0000\n" in screen.getvalue()
        assert second.startswith("[2/3] seed=2") and third.startswith("[3/3] moe.n_experts=8")
        # The name gives way to the columns of numbers.
        assert "…" in third and third.endswith("0/100") and len(third) <= 60


def test_elsewhere_there_is_one_line_for_each_point(
    points: list[Point], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = SweepProgress(points[:2], first=5)
    with shown:
        shown.began(points[0])
        shown.draw("")
        shown.ended(points[0], "done in 3 s, no validation")
        shown.ended(points[1], "already done, no validation")
    assert capsys.readouterr().out == (
        "[6/7] seed=1: done in 3 s, no validation\n[7/7] seed=2: already done, no validation\n"
    )
