"""`lunaris runs`: a table of runs and sweep points: state, step, losses, time, job."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.console import is_terminal, terminal
from lunaris.runs.rows import run_rows
from lunaris.runs.status import ACTIVE, STATES
from lunaris.runs.table import Table, best_rows, plain_rows, sort_rows, tables

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable

_EXAMPLES = """\
examples:
  lunaris runs                                  all below ./runs and ./sweeps
  lunaris runs sweeps/first --sort val_loss     a sweep, its best point first
  lunaris runs sweeps/first --best
  lunaris runs --csv > runs.csv
  lunaris runs --watch                          again and again, until all have ended"""
_STYLES = {
    "done": "green", "running": "cyan", "queued": "yellow", "failed": "red", "timeout": "red",
    "node_fail": "red", "out_of_memory": "red",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Print a table of all runs below a folder, and why some of them failed or wait."""
    args = _parser().parse_args(argv)
    if args.watch is not None:
        _watch(args)
        return 0
    rows = _rows(args)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.csv:
        heads, cells = plain_rows(rows)
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([heads, *cells])
    elif is_terminal(sys.stdout):
        console = terminal(sys.stdout)
        for shown in _rich(rows, console.width):
            console.print(shown)
    else:
        print("\n\n".join("\n".join(_lines(table)) for table in tables(rows)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris runs",
        description="A table of runs and sweep points. States: " + ", ".join(STATES) + ".",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dir", nargs="?", default=".", help="a run, a sweep, or a folder of them (default: here)")
    add("--sort", metavar="KEY", help="by a column (val_loss, loss, step, time, …) or an override")
    add("--reverse", action="store_true", help="with --sort: the largest first")
    add("--best", action="store_true", help="only the lowest validation loss of each sweep")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON list")
    form.add_argument("--csv", action="store_true", help="print a CSV file, a column an override")
    form.add_argument(
        "--watch", nargs="?", const=5.0, type=_seconds, metavar="SECONDS",
        help="print the table again every 5 s, until all runs have ended",
    )  # fmt: skip
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise ValueError(text)
    return seconds


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = run_rows(Path(args.dir))
    if args.sort is not None:
        rows = sort_rows(rows, args.sort, reverse=args.reverse)
    return best_rows(rows) if args.best else rows


def _watch(args: argparse.Namespace) -> None:
    """Print the table until no run is active: on a terminal in place, elsewhere one below another.

    A signal ends it: nothing would be lost.
    """
    from rich.console import Group
    from rich.live import Live

    live = None
    if is_terminal(sys.stdout):
        live = Live(console=terminal(sys.stdout), auto_refresh=False)
        live.start()
    try:
        while True:
            rows = _rows(args)
            if live is not None:
                live.update(Group(*_rich(rows, live.console.width)), refresh=True)
            else:
                print("\n\n".join("\n".join(_lines(table)) for table in tables(rows)), flush=True)
            if not any(row["state"] in ACTIVE for row in rows):
                return
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()


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


def _rich(rows: list[dict[str, Any]], width: int) -> Iterator[RenderableType]:
    """Yield the tables for a terminal of so many columns."""
    from rich.text import Text

    for i, table in enumerate(tables(rows)):
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
