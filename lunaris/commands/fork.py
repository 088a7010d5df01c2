"""`lunaris fork`: start a new run from the frozen config of another, with other values."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from lunaris.config.compose import Source
from lunaris.errors import UserError
from lunaris.runs.create import create
from lunaris.runs.discovery import is_run, is_sweep


def main(argv: list[str]) -> int:
    """Print the difference, then launch as `lunaris train` does; return its exit code."""
    from lunaris.commands.train import submit
    from lunaris.continuation.fork import best_point, plan_fork

    args = _parser().parse_intermixed_args(argv)
    folder = Path(args.dir)
    if args.best:
        folder = best_point(folder)
    elif not is_run(folder):
        hint = "; add --best for the best of its points" if is_sweep(folder) else ""
        raise UserError(f"{folder}: not a run's folder{hint}")
    fork = plan_fork(folder, args.overrides, Source(dir=args.config_dir))
    command = shlex.join(["lunaris", "fork", *argv])
    # Of the processes that torchrun started, rank 0 writes; a rehearsal writes nothing.
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(fork.lines()))
        if not getattr(fork.cfg.launch, "dry_run", False):
            create(fork.cfg, command, args.overrides).add_parent(fork.parent)
    return submit(fork.cfg, command, args.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris fork",
        description="Start a new run from the frozen config of another one, with other values. It "
        "begins at step 0, in a folder of another name; the run that it is forked from is kept in "
        "its provenance.",
        epilog="examples: lunaris fork runs/first optimizer.learning_rate=1e-3; "
        "lunaris fork sweeps/first --best trainer.max_steps=20000 name=long",
    )
    parser.add_argument("dir", help="the folder of a run, or of a sweep with --best")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="what differs, as for lunaris train"
    )
    parser.add_argument(
        "--best", action="store_true", help="take the run below DIR with the lowest validation loss"
    )
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder with more options")
    return parser
