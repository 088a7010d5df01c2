"""`lunaris report`: an HTML page of a run, a sweep or several runs, which needs no network."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.discovery import FoundRun, find_runs


def main(argv: list[str]) -> int:
    """Write the page, and pictures with --png; print where they are."""
    args = _parser().parse_args(argv)
    folders = [Path(text) for text in args.dir]
    found = _found(folders)
    if len(found) != 1:
        raise UserError(f"{' '.join(args.dir)}: holds {len(found)} runs; give the folder of one")
    if args.png is not None and Path(args.png).exists() and not Path(args.png).is_dir():
        raise UserError(f"--png {args.png}: is a file; give a folder")
    # Imported here: `--help` and a wrong folder need no numpy and no Hydra.
    from lunaris.report.page import NAME, write
    from lunaris.report.record import read_records
    from lunaris.report.run_page import run_page

    to = Path(args.to) if args.to else folders[0] / NAME
    records = read_records(found)
    page = run_page(records[0], _defaults())
    write(page, to)
    print(f"report     {to}")
    if args.png is not None:
        from lunaris.report.pictures import write_pictures

        pictures = write_pictures(page.charts(), Path(args.png), records[0])
        print(f"pictures   {len(pictures)} in {args.png}")
    if args.open:
        webbrowser.open(to.resolve().as_uri())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris report",
        description="Write one HTML file that shows a run: losses, learning rate, speed, memory, "
        "the load of its experts, its config and where it comes from. The file holds "
        "everything and opens from disk without a network.",
        epilog="examples: lunaris report runs/first; lunaris report runs/first --png pictures",
    )
    parser.add_argument("dir", nargs="+", help="the folder of a run")
    parser.add_argument("--to", metavar="FILE", help="the file (default: DIR/report.html)")
    parser.add_argument("--png", metavar="DIR", help="write the charts as pictures too")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    return parser


def _found(folders: list[Path]) -> list[FoundRun]:
    return [run for folder in folders for run in find_runs(folder)]


def _defaults() -> dict[str, object]:
    """Return the config of a command without overrides, flat and dotted."""
    from lunaris.config.compose import compose
    from lunaris.config.frozen import to_tree
    from lunaris.report.record import flat

    return flat(to_tree(compose([], check_data=False)))
