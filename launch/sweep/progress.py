"""What a person sees while the points of a sweep run on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lunaris.console import Below, is_terminal, say
from lunaris.launch.sweep.points import Point
from lunaris.metrics.time_left import in_words
from lunaris.runs.rows import last_values
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# Seconds between two drawings of the table.
_DRAW_S = 1.0


class Silent:
    """Shows nothing: the progress of points that another program starts and reports."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def began(self, point: Point) -> None:
        """Show that a point runs now."""

    def ended(self, point: Point, text: str) -> None:
        """Show how a point ended, or that it is done already."""

    def draw(self, note: str) -> None:
        """Show how far the points are; note: what else there is to know, or an empty string."""


class SweepProgress(Silent):
    """A line for each point that ended, and on a terminal a table of those that run."""

    def __init__(self, points: Sequence[Point], first: int = 0) -> None:
        """first: how many points this sweep has run before, which a label counts too."""
        total = first + len(points)
        self._labels = {p.name: f"[{first + i}/{total}] {p.name}" for i, p in enumerate(points, 1)}
        self._running: dict[str, _Running] = {}
        self._note = ""
        self._drawn = 0.0
        self._below = Below(self) if is_terminal(sys.stdout) else None

    def __enter__(self) -> None:
        if self._below is not None:
            self._below.start()

    def __exit__(self, *error: object) -> None:
        if self._below is not None:
            self._below.stop()

    def began(self, point: Point) -> None:
        self._running[point.name] = _Running(point)
        self._drawn = 0.0

    def ended(self, point: Point, text: str) -> None:
        self._running.pop(point.name, None)
        say(f"{self._labels[point.name]}: {text}")

    def draw(self, note: str) -> None:
        now = time.monotonic()
        if self._below is None or (note == self._note and now - self._drawn < _DRAW_S):
            return
        self._note, self._drawn = note, now
        for row in self._running.values():
            row.read(now)
        self._below.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.constrain import Constrain
        from rich.table import Table
        from rich.text import Text

        if not self._running:
            return
        table = Table(box=None, pad_edge=False, header_style="dim", caption=self._note or None)
        table.caption_justify, table.caption_style = "left", ""
        table.add_column("point")
        for name in ("step", "loss", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, row in self._running.items():
            # Of all columns this one gives way to a narrow terminal.
            label = Text(self._labels[name], no_wrap=True, overflow="ellipsis")
            table.add_row(label, *row.cells())
        # A terminal echoes ^C behind a line, which must not break it in two.
        yield Constrain(table, options.max_width - len("^C") - 1)


class _Running:
    """How far a running point is, as its metrics file tells."""

    def __init__(self, point: Point) -> None:
        self._path = RunDir(point.dir).metrics_path
        self._max_steps = point.cfg.trainer.end()
        self._step, self._loss = self._last()
        # The time (seconds) and the step of the first row that this process wrote, and of the last.
        self._first: tuple[float, int] | None = None
        self._newest = (0.0, 0)

    def read(self, now: float) -> None:
        """Read the last row. now: seconds, of the monotonic clock."""
        before = self._step
        self._step, self._loss = self._last()
        if self._step == before:
            return
        self._newest = (now, self._step)
        if self._first is None or self._step < before:
            self._first = self._newest

    def cells(self) -> list[str]:
        """Return the step, the loss and the time that is left, as far as they are known."""
        loss = "" if self._loss is None else f"{self._loss:.4f}"
        return [f"{self._step}/{self._max_steps}", loss, self._left()]

    def _left(self) -> str:
        if self._first is None or self._first == self._newest:
            return ""
        (began, first), (at, step) = self._first, self._newest
        return in_words((at - began) / (step - first) * (self._max_steps - step))

    def _last(self) -> tuple[int, float | None]:
        found = last_values(self._path, ("step", "train/loss"))
        return int(found.get("step", 0)), found.get("train/loss")
