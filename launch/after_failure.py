"""What the script of a job runs when its tasks have failed: counts it and requeues the job.

It runs outside of the tasks, because a rank that was killed cannot count anything. The script runs
on the host, also where the tasks run in a container, by a python that may lack what this package
needs; so this module imports nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lunaris.errors import UserError
from lunaris.launch.requeue import exclude, is_running, requeue, requeue_without
from lunaris.runs.first_cause import first_cause, recorded_errors
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import cancel_jobs


def main(argv: list[str]) -> None:
    """Count a failure of the run that a file names, and requeue its job up to a limit.

    argv: the file that the job's rank 0 has written, the exit code of the tasks, and
    `launch.max_failures`.
    """
    file, code, limit = Path(argv[0]), argv[1], int(argv[2])
    if not file.is_file() or not is_running():
        return  # No rank has begun to run, or SLURM ends the job.
    run_dir = RunDir(file.read_text())
    status = run_dir.read_status()
    if status.get("state") in (*FINISHED, "stopped"):
        return
    chain = status.get("chain") or []
    further = chain[chain.index(status["job_id"]) + 1 :] if status.get("job_id") in chain else []
    if status.get("bad_nodes"):
        _leave_out(run_dir, status, further, chained=bool(chain))
        return
    if not _may_pass(run_dir, status):
        _cancel(further)
        return
    cause = first_cause(run_dir.path, status)
    said = cause.message if cause is not None else status.get("last_error")
    said = said or f"exit code {code}"
    failures = status.get("failures", 0) + 1
    if failures > limit or (chain and not further):
        run_dir.write_status(failures=failures, last_failure=said)
        _cancel(further)
        return
    # Before the requeue, because SLURM may kill this process soon after it.
    run_dir.write_status(state="queued", failures=failures, last_failure=said)
    how = "left to the next job" if chain else "requeued"
    print(f"{how} after failure {failures} of {limit}: {said}", flush=True)
    if chain:
        return
    refusal = requeue()
    if refusal is not None:
        refused = f"{said}; SLURM refuses to requeue: {refusal}"
        run_dir.write_status(state=status.get("state"), last_error=refused)


def _leave_out(
    run_dir: RunDir, status: dict[str, Any], further: list[str], *, chained: bool
) -> None:
    """Requeue the job without the nodes that the preflight found bad, at most once for each node.

    Of a chain, the jobs that follow get other nodes.
    """
    bad = status["bad_nodes"]
    excluded = {**(status.get("excluded") or {}), **bad}
    tries = status.get("preflights", 0) + 1
    if tries > int(os.environ["SLURM_JOB_NUM_NODES"]) or (chained and not further):
        run_dir.write_status(bad_nodes={}, excluded=excluded)
        _cancel(further)
        return
    run_dir.write_status(state="queued", bad_nodes={}, excluded=excluded, preflights=tries)
    print(f"without {', '.join(bad)} from now on: {'; '.join(bad.values())}", flush=True)
    refusal = exclude(further, excluded) if chained else requeue_without(excluded)
    if refusal is not None:
        error = f"SLURM does not leave out {', '.join(bad)}: {refusal}"
        # Where the job has not even been requeued, it ends here.
        ended = {"state": "failed"} if not chained and is_running() else {}
        run_dir.write_status(last_error=error, **ended)
        print(error, flush=True)


def _cancel(further: list[str]) -> None:
    """Cancel the jobs that were to continue the run, and so those that wait for its success."""
    with suppress(RuntimeError):
        cancel_jobs(further)


def _may_pass(run_dir: RunDir, status: dict[str, Any]) -> bool:
    """Return whether another attempt may end better; a wrong input or too little memory stay."""
    errors = recorded_errors(run_dir.logs).values()
    if any(e["extraInfo"].get("exit_code") == UserError.exit_code for e in errors):
        return False
    cause = first_cause(run_dir.path, status)
    return cause is None or cause.state != "out_of_memory"


if __name__ == "__main__":
    main(sys.argv[1:])
