"""`lunaris wandb-sync`: send the metrics of runs to Weights & Biases."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from lunaris.config.schema.logger import WandbLoggerConfig
from lunaris.errors import RunFailed, UserError
from lunaris.runs.discovery import find_runs, is_run, is_sweep
from lunaris.runs.run_dir import RunDir

# A day.
_MOST_S = 86400


def main(argv: list[str]) -> int:
    """Send every row of each run. Raises RunFailed where W&B does not take one of them."""
    args = _parser().parse_args(argv)
    folders = [Path(folder) for folder in args.dirs]
    for folder in folders:
        if not is_run(folder) and not is_sweep(folder):
            raise UserError(f"{folder}: not a run's folder and not a sweep's")
    if not 0 < args.timeout <= _MOST_S:
        raise UserError(f"--timeout {args.timeout:g}: must be greater than 0, at most {_MOST_S}")
    runs = [RunDir(run.path) for folder in folders for run in find_runs(folder)]
    failed = [run.path for run in runs if not _send(run, args)]
    if failed:
        shown = ", ".join(map(str, failed))
        raise RunFailed(f"W&B has not taken {shown}; each logs/wandb.log says more")
    return 0


def _send(run_dir: RunDir, args: argparse.Namespace) -> bool:
    """Send one run and print the outcome; return whether W&B has taken it all."""
    from lunaris.metrics.wandb_feed import read_state, start_state
    from lunaris.metrics.wandb_logger import end_feed, start_feed

    keys = _keys(run_dir, args)
    start_state(run_dir, keys)
    sent = end_feed(start_feed(run_dir, keys, subprocess.DEVNULL), args.timeout)
    state = read_state(run_dir)
    if sent and state is not None:
        print(f"{run_dir.path}: {state.rows} rows; {state.url}")
        return True
    reason = (state and state.error) or f"no answer in {args.timeout:g} s"
    print(f"{run_dir.path}: not sent ({reason})")
    return False


def _keys(run_dir: RunDir, args: argparse.Namespace) -> dict[str, Any]:
    cfg = run_dir.read_config()
    logger = cfg.logger.get("wandb")
    found = logger if isinstance(logger, WandbLoggerConfig) else WandbLoggerConfig()
    return {
        "project": args.project or found.project,
        "entity": args.entity or found.entity,
        "group": found.group,
        "job_type": found.job_type,
        "tags": found.tags,
        "name": cfg.name,
        "mode": "online",
        "fallback": False,
        "finish_timeout_s": args.timeout,
        # Within the timeout, so that what W&B says about its start is shown.
        "init_timeout_s": min(found.init_timeout_s, args.timeout / 2),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris wandb-sync",
        description="Send every row of metrics.jsonl to Weights & Biases: of runs that were "
        "offline, whose connection broke, or that were trained without W&B. A run that W&B has in "
        "part gets what it lacks.",
        epilog="example: lunaris wandb-sync runs/first sweeps/second",
    )
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="folders of runs and sweeps")
    parser.add_argument("--project", help="for runs that were never with W&B")
    parser.add_argument("--entity", help="for runs that were never with W&B")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS", help="for each run (300)"
    )
    return parser
