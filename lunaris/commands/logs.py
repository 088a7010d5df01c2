"""`lunaris logs`: print the log of a run, here or on SLURM; -f follows it until the run ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.discovery import find_runs, is_run, is_sweep
from lunaris.runs.follow import RunLog
from lunaris.runs.run_dir import RunDir, not_a_run

_SHOWN_POINTS = 3


def main(argv: list[str]) -> int:
    """Print the log of a process of a run, of all its attempts in order."""
    args = _parser().parse_args(argv)
    folder = Path(args.dir)
    if is_sweep(folder) and not is_run(folder):
        points = [str(run.path) for run in find_runs(folder)]
        more = ", …" if len(points) > _SHOWN_POINTS else ""
        raise UserError(
            f"{folder}: is a sweep; give the folder of one of its points: "
            f"{', '.join(points[:_SHOWN_POINTS])}{more}"
        )
    if not (is_run(folder) or RunDir(folder).read_status()):
        raise UserError(not_a_run(folder))
    log = RunLog(folder, args.rank)
    _print(log.follow() if args.follow else log.read())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris logs",
        description="Prints the log of a run that trains or trained here or on SLURM: everything "
        "that one of its processes wrote, in all attempts.",
        epilog="example: lunaris logs runs/default -f",
    )
    parser.add_argument("dir", help="the folder of a run, or of a point of a sweep")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="print further lines until the run ends"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="K", help="the process (default: 0)")
    return parser


def _print(parts: Iterable[bytes]) -> None:
    for part in parts:
        # A run's processes may write any bytes.
        sys.stdout.write(part.decode(errors="replace"))
        sys.stdout.flush()
