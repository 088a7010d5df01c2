"""`lunaris cancel`: cancel the SLURM jobs of a run or a sweep."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs import status as jobs
from lunaris.runs.discovery import find, is_run, is_sweep
from lunaris.runs.run_dir import RunDir

HELP = "cancel the SLURM jobs of a run or a sweep"


def main(argv: list[str]) -> int:
    """Cancel every job that is queued or running. Raises UserError where SLURM refuses."""
    args = _parser().parse_args(argv)
    folder = Path(args.dir)
    if not is_run(folder) and not is_sweep(folder):
        raise UserError(f"{folder}: not a run's folder and not a sweep's")
    listed = find(folder)
    states = jobs.states([run.path for run in listed])
    active = [(r, s) for r, s in zip(listed, states, strict=True) if s.state in jobs.ACTIVE]
    sent = [(run, state.job_id) for run, state in active if state.job_id]
    for run, state in active:
        if not state.job_id:
            print(f"{run.path}: runs here, not as a job; end it with Ctrl-C where it was started")
    if not sent:
        print(f"{folder}: no job to cancel")
        return 0
    for run, _ in sent:
        # Before, so that no moment shows a job that is gone and was not cancelled.
        RunDir(run.path).write_status(cancelled=time.time())
    try:
        jobs.cancel([job_id for _, job_id in sent])
    except RuntimeError as error:
        for run, _ in sent:
            RunDir(run.path).write_status(cancelled=None)
        raise UserError(f"{folder}: SLURM refuses to cancel: {error}") from error
    for run, job_id in sent:
        print(f"cancelled job {job_id}: {run.path}")
    print(f"what was trained is kept; `lunaris resume {folder}` goes on")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris cancel",
        description="Cancel the SLURM jobs of a run or a sweep, those that wait and those that "
        "run. A running one saves a checkpoint first.",
        epilog="example: lunaris cancel sweeps/first",
    )
    parser.add_argument("dir", help="the folder of a run or a sweep")
    return parser
