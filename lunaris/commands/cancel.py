"""`lunaris cancel`: cancel the SLURM jobs of a run or a sweep."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.discovery import find_runs, is_run, is_sweep
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import cancel_jobs
from lunaris.runs.status import refuse_unknown, resolve_states


def main(argv: list[str]) -> int:
    """Cancel every queued or running job in a folder. Raises UserError where SLURM refuses."""
    args = _parser().parse_args(argv)
    folder = Path(args.dir)
    if not is_run(folder) and not is_sweep(folder):
        raise UserError(f"{folder}: not a run's folder and not a sweep's")
    found = find_runs(folder)
    paths = [run.path for run in found]
    states = resolve_states(paths)
    refuse_unknown(paths, states)
    active = [(run, state) for run, state in zip(found, states, strict=True) if state.active]
    sent = [(run, state.job_id) for run, state in active if state.job_id]
    for run, state in active:
        if not state.job_id:
            print(f"{run.path}: not a job; stop it with Ctrl-C where it was started")
    if not sent:
        print(f"{folder}: no job to cancel")
        return 0
    for run, _ in sent:
        # Written first, so that a job that is gone is never seen without the mark.
        RunDir(run.path).write_status(cancelled=time.time())
    try:
        cancel_jobs([job_id for _, job_id in sent])
    except RuntimeError as error:
        for run, _ in sent:
            RunDir(run.path).write_status(cancelled=None)
        raise UserError(f"{folder}: SLURM refuses to cancel: {error}") from error
    for run, job_id in sent:
        print(f"cancelled job {job_id}: {run.path}")
    print(
        f"the checkpoints are kept; `lunaris resume {shlex.quote(str(folder))}` continues from them"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris cancel",
        description="Cancel the queued and running SLURM jobs of a run or a sweep. A running job "
        "saves a checkpoint first.",
        epilog="example: lunaris cancel sweeps/first",
    )
    parser.add_argument("dir", help="the folder of a run or a sweep")
    return parser
