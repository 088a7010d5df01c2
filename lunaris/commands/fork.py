"""`lunaris fork`: start a new run from the frozen config of another, with other values."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from lunaris.config.compose import Source
from lunaris.config.trust import add_flag, allow, allow_named
from lunaris.errors import UserError
from lunaris.runs.create import create
from lunaris.runs.discovery import is_run, is_sweep
from lunaris.runs.run_dir import not_a_run


def main(argv: list[str]) -> int:
    """Print the difference, then launch as `lunaris train` does; return its exit code."""
    from lunaris.commands.train import submit
    from lunaris.continuation.checks import check_start
    from lunaris.continuation.fork import best_point, plan_fork

    args = _parser().parse_intermixed_args(argv)
    allow(args.trust)
    allow_named(args.overrides)
    folder = Path(args.dir)
    if args.best:
        folder = best_point(folder)
    elif not is_run(folder):
        hint = "; add --best for the best of its points" if is_sweep(folder) else ""
        raise UserError(not_a_run(folder) + hint)
    if args.at is not None and not args.weights:
        raise UserError(f"--at {args.at}: goes with --weights, whose checkpoint it chooses")
    source = Source(dir=args.config_dir)
    fork = plan_fork(folder, args.overrides, source, weights=args.weights, at=args.at)
    command = shlex.join(["lunaris", "fork", *argv])
    if os.environ.get("RANK", "0") == "0":
        check_start(fork.cfg)
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
        "begins at step 0, in a folder of another name, by choice with the weights of the other, "
        "which its provenance names.",
        epilog="examples: lunaris fork runs/first optimizer.learning_rate=1e-3; "
        "lunaris fork runs/first --weights --at 200 data=shards data.dir=shards/mine; "
        "lunaris fork sweeps/first --best trainer.max_steps=20000 name=long",
    )
    parser.add_argument("dir", help="the folder of a run, or of a sweep with --best")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="what differs, as for lunaris train"
    )
    parser.add_argument(
        "--best", action="store_true", help="take the run below DIR with the lowest validation loss"
    )
    parser.add_argument(
        "--weights", action="store_true", help="start from the weights of its newest checkpoint"
    )
    parser.add_argument(
        "--at", type=int, metavar="STEP", help="with --weights: from the checkpoint of this step"
    )
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder with more options")
    add_flag(parser)
    return parser
