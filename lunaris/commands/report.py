"""`lunaris report`: an HTML page of a run, a sweep or several runs, which needs no network."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.discovery import find_runs, is_sweep
from lunaris.runs.sweep_manifest import read_manifest


def main(argv: list[str]) -> int:
    """Write the page, and pictures with --png; print where they are."""
    args = _parser().parse_args(argv)
    folders = [Path(text) for text in args.dir]
    if len(folders) > 1:
        raise UserError(f"{' '.join(args.dir)}: give one folder, of a run or of a sweep")
    folder = folders[0]
    found = find_runs(folder)
    sweep = is_sweep(folder)
    if len(found) != 1 and not sweep:
        raise UserError(f"{folder}: holds {len(found)} runs; give the folder of one, or a sweep's")
    if args.png is not None and Path(args.png).exists() and not Path(args.png).is_dir():
        raise UserError(f"--png {args.png}: is a file; give a folder")
    # Imported here: `--help` and a wrong folder need no numpy and no Hydra.
    from lunaris.report.page import NAME, write
    from lunaris.report.record import read_records
    from lunaris.report.run_page import run_page
    from lunaris.report.sweep_page import sweep_page

    to = Path(args.to) if args.to else folder / NAME
    records = read_records(found)
    if sweep:
        page = sweep_page(folder, read_manifest(folder), records)
    else:
        page = run_page(records[0], _defaults())
    write(page, to)
    print(f"report     {to}")
    if args.png is not None:
        from lunaris.report.pictures import write_pictures

        pictures = write_pictures(page.charts(), Path(args.png), None if sweep else records[0])
        print(f"pictures   {len(pictures)} in {args.png}")
    if args.open:
        webbrowser.open(to.resolve().as_uri())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris report",
        description="Write one HTML file that shows a run (losses, learning rate, speed, memory, "
        "the load of its experts, its config and where it comes from) or a sweep (its points in a "
        "table, their curves, what each key did). The file holds everything and opens from disk "
        "without a network.",
        epilog="examples: lunaris report runs/first; lunaris report sweeps/lr --png pictures",
    )
    parser.add_argument("dir", nargs="+", help="the folder of a run or of a sweep")
    parser.add_argument("--to", metavar="FILE", help="the file (default: DIR/report.html)")
    parser.add_argument("--png", metavar="DIR", help="write the charts as pictures too")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    return parser


def _defaults() -> dict[str, object]:
    """Return the config of a command without overrides, flat and dotted."""
    from lunaris.config.compose import compose
    from lunaris.config.frozen import to_tree
    from lunaris.report.record import flat

    return flat(to_tree(compose([], check_data=False)))
