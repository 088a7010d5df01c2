"""`lunaris runs`: a table of runs and sweep points: state, step, losses, time, job."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

from lunaris.console import is_terminal, terminal
from lunaris.runs.rows import run_rows
from lunaris.runs.show import for_terminal, show
from lunaris.runs.status import ACTIVE, STATES
from lunaris.runs.table import best_rows, plain_rows, sort_rows, tables

_EXAMPLES = """\
examples:
  lunaris runs                                  all below ./runs and ./sweeps
  lunaris runs sweeps/first --sort val_loss     a sweep, its best point first
  lunaris runs sweeps/first --best
  lunaris runs --csv > runs.csv
  lunaris runs --watch                          again and again, until all have ended"""


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
    else:
        show(tables(rows))
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
                live.update(Group(*for_terminal(tables(rows), live.console.width)), refresh=True)
            else:
                show(tables(rows))
            if not any(row["state"] in (*ACTIVE, "unknown") for row in rows):
                return
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()
