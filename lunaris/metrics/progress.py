"""The progress of a run as one line, on a terminal with a bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunaris.console import WIDTH, current_phase
from lunaris.metrics.records import Row

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_SHOWN = (
    ("train/loss", "loss {:.4f}"),
    ("val/loss", "val {:.4f}"),
    ("perf/tokens_per_s", "{:,.0f} tokens/s"),
)
# Of the parts that do not all fit, the first ones here stay.
_IMPORTANCE = ("train/loss", "time", "val/loss", "perf/tokens_per_s")
_SHORTEST_BAR, _LONGEST_BAR = 8, 40


class Progress:
    """The step, the last losses and speed, and what is left; rich renders it as one line.

    left: how long the run still takes, in words, or an empty string as long as that is not known.
    """

    def __init__(self, step: int, max_steps: int) -> None:
        self.step, self.max_steps = step, max_steps
        self.left = ""
        self._parts: dict[str, str] = {}

    def take(self, row: Row) -> None:
        """Show the losses and the speed of a row from now on."""
        self._parts |= _parts(row)

    def line(self, row: Row) -> str:
        """Return the line of one row, for a place where each row has its own."""
        parts = [f"step {row['step']}/{self.max_steps}", *_parts(row).values(), self.left]
        return "  ".join(part for part in parts if part)

    def short_line(self, row: Row) -> str:
        """Return the line of one row that stays above the bar: as much as fits 60 columns."""
        step, parts = f"step {row['step']}/{self.max_steps}", _parts(row)
        kept = _fitting(parts, WIDTH - len(step))[0]
        return "  ".join([step, *(text for name, text in parts.items() if name in kept)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = f"step {self.step}/{self.max_steps}"
        last = current_phase() or self.left
        parts = {key: self._parts[key] for key, _ in _SHOWN if key in self._parts}
        parts |= {"time": last} if last else {}
        # A terminal echoes ^C behind the line, which must not break it in two.
        width = options.max_width - len("^C") - 1
        kept, room = _fitting(parts, width - len(step) - 2 - _SHORTEST_BAR)
        bar = min(_LONGEST_BAR, _SHORTEST_BAR + room)
        row: list[ProgressBar | Text] = [Text(step)]
        if bar > 0:
            row.append(ProgressBar(self.max_steps, self.step, width=bar))
        styles = {"train/loss": "bold", "val/loss": "cyan"}
        row += [Text(text, styles.get(n, "")) for n, text in parts.items() if n in kept]
        grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for _ in row:
            grid.add_column(no_wrap=True, overflow="crop")
        grid.add_row(*row)
        yield grid


def _parts(row: Row) -> dict[str, str]:
    """Return what a row says in the order in which it is shown, by its key."""
    return {key: form.format(row[key]) for key, form in _SHOWN if row.get(key) is not None}


def _fitting(parts: dict[str, str], room: int) -> tuple[set[str], int]:
    """Return the parts for which there is room, and the columns left. The loss always stays."""
    kept = set()
    for name in _IMPORTANCE:
        size = len(parts.get(name, "")) + 2
        if name in parts and (size <= room or name == "train/loss"):
            kept.add(name)
            room -= size
    return kept, room
