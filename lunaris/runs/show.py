"""Prints tables of runs: for a terminal in colours and in its width, for a pipe in full."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lunaris.console import is_terminal, terminal
from lunaris.runs.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable

_STYLES = {
    "done": "green", "running": "cyan", "queued": "yellow", "failed": "red", "timeout": "red",
    "node_fail": "red", "out_of_memory": "red",
}  # fmt: skip


def show(tables: Sequence[Table]) -> None:
    """Print tables to standard output."""
    if not is_terminal(sys.stdout):
        print("\n\n".join("\n".join(_lines(table)) for table in tables), flush=True)
        return
    console = terminal(sys.stdout)
    for part in for_terminal(tables, console.width):
        console.print(part)


def _lines(table: Table) -> Iterator[str]:
    """Yield the lines of a table for a pipe, with every column in full."""
    if table.title:
        yield table.title
    rows = [table.heads, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.heads))]
    for row in rows:
        cells = (cell.ljust(size) for cell, size in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
    yield from table.notes


def for_terminal(tables: Sequence[Table], width: int) -> Iterator[RenderableType]:
    """Yield tables for a terminal of so many columns."""
    from rich.text import Text

    for i, table in enumerate(tables):
        if i:
            yield Text("")
        if table.title:
            yield Text(table.title, "bold")
        yield _rich_table(table, width)
        for note in table.notes:
            yield Text(note, "dim")


def _rich_table(table: Table, width: int) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    heads = _fitting(table, width)
    room = width - _needed(table, [name for name in heads if name != "overrides"]) - 2
    for name in heads:
        # Names and swept values may be broken and overrides cut; losses and states stay whole.
        may_break = name in ("run", *table.swept)
        made.add_column(
            name,
            no_wrap=not may_break,
            overflow="fold" if may_break else "ellipsis",
            max_width=room if name == "overrides" else None,
        )
    for row in table.rows:
        cells = dict(zip(table.heads, row, strict=True))
        made.add_row(
            *(
                Text(cells[name], _STYLES.get(cells[name], "") if name == "state" else "")
                for name in heads
            )
        )
    return made


def _fitting(table: Table, width: int) -> list[str]:
    """Return the columns for which a terminal is wide enough, without the least important ones.

    The points of a sweep are named by its swept keys: their names may go before the keys do.
    """
    heads = list(table.heads)
    for name in [*table.wide, *(["run", "step"] if table.swept else [])]:
        if _needed(table, heads) <= width:
            break
        if name in heads:
            heads.remove(name)
    return heads


def _needed(table: Table, heads: list[str]) -> int:
    """Return the columns of a terminal that a table needs; some cells may be broken in lines."""
    narrowest = {"overrides": 32} | ({} if table.swept else {"run": 24})
    needed = 0
    for i, name in enumerate(table.heads):
        if name in heads:
            longest = max(len(cells[i]) for cells in [table.heads, *table.rows])
            needed += 2 + min(longest, narrowest.get(name, longest))
    return needed - 2
