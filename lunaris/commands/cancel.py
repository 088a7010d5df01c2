"""`lunaris cancel`: cancel the SLURM jobs of a run, a sweep or a preparation."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.discovery import find_runs, is_run, is_sweep
from lunaris.runs.preparation import is_preparation
from lunaris.runs.run_dir import RunDir, not_a_run
from lunaris.runs.slurm_client import cancel_jobs
from lunaris.runs.status import refuse_unknown, resolve_states
from lunaris.runs.sweep_manifest import read_manifest


def main(argv: list[str]) -> int:
    """Cancel every queued or running job in a folder, or those of a sweep's removed points.

    Raises UserError where SLURM refuses.
    """
    args = _parser().parse_args(argv)
    folder = Path(args.dir)
    prepares = is_preparation(folder)
    if not is_run(folder) and not is_sweep(folder) and not prepares:
        raise UserError(not_a_run(folder, ", not a sweep's, and none that jobs prepare"))
    found = find_runs(folder, preparations=prepares)
    if args.removed:
        if not is_sweep(folder):
            raise UserError(f"--removed: goes with the folder of a sweep, which {folder} is not")
        removed = read_manifest(folder).removed
        found = [run for run in found if run.name in removed]
    paths = [run.path for run in found]
    states = resolve_states(paths)
    refuse_unknown(paths, states)
    active = [(run, state) for run, state in zip(found, states, strict=True) if state.active]
    sent = [(run, state.job_ids) for run, state in active if state.job_ids]
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
        cancel_jobs([job_id for _, ids in sent for job_id in ids])
    except RuntimeError as error:
        for run, _ in sent:
            RunDir(run.path).write_status(cancelled=None)
        raise UserError(f"{folder}: SLURM refuses to cancel: {error}") from error
    for run, ids in sent:
        print(f"cancelled job{'s' * (len(ids) > 1)} {', '.join(ids)}: {run.path}")
    if prepares:
        print("what is encoded is kept; the same `lunaris prepare` command continues")
        return 0
    if args.removed:
        print("the checkpoints are kept; the sweep's command with these values continues from them")
        return 0
    print(
        f"the checkpoints are kept; `lunaris resume {shlex.quote(str(folder))}` continues from them"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris cancel",
        description="Cancel the queued and running SLURM jobs of a run, a sweep or a preparation "
        "(`lunaris prepare launch=slurm`). A run saves a checkpoint first.",
        epilog="examples: lunaris cancel sweeps/first; lunaris cancel sweeps/first --removed",
    )
    parser.add_argument("dir", help="the folder of a run, a sweep or shards")
    parser.add_argument(
        "--removed",
        action="store_true",
        help="of a sweep, only the points that its last command does not have any more",
    )
    return parser
