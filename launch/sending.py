"""Jobs and arrays as SLURM gets them: their order, and what the folders of their runs keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.errors import UserError
from lunaris.launch.arrays import split
from lunaris.launch.slurm_task import Task
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import cancel_jobs, max_array_size

# From tasks, dependencies and how many tasks run at a time, to submitit's jobs.
Submit = Callable[[list[Task], Sequence[str], int], list[Any]]


def send_all(
    paths: Sequence[Path], keys: SlurmLaunchConfig, submit: Submit, awaited: Sequence[str]
) -> list[str]:
    """Send the runs in some folders as one job, or as arrays; return a job id for each.

    submit: sends tasks as one job or array. awaited: dependencies of all of them. Raises UserError
    when SLURM refuses a job; the runs that it refuses, and those that would follow, are failed,
    with its reason.
    """
    largest = max_array_size() if len(paths) > 1 else None
    parts = split(len(paths), largest, keys.array_parallelism)
    ids: list[str] = []
    # Of each part, the dependency on its end.
    ends: list[str] = []
    for part in parts:
        before = [] if part.after is None else [ends[part.after]]
        chosen = paths[part.first : part.first + part.size]
        links: list[list[Any]] = []
        try:
            for link in range(1, keys.chain + 1):
                tasks = [Task(path.absolute(), link, keys.chain) for path in chosen]
                links.append(submit(tasks, [*awaited, *before], part.parallelism))
                before = [end_of(links[-1][0].job_id)]
                # At once, so that a command that is interrupted here leaves no unknown job.
                _record_links(chosen, links, keys.chain)
        except (FailedJobError, FailedSubmissionError) as error:
            # A chain is sent completely or not at all.
            forgotten: dict[str, Any] = {"job_id": None, "chain": []}
            try:
                cancel_jobs([array_of(sent[0].job_id) for sent in links])
            except RuntimeError:
                forgotten = {}  # They still wait.
            refused = refusal(error)
            for path in paths[part.first :]:
                RunDir(path).write_status(state="failed", last_error=refused, **forgotten)
            sooner = f" ({part.first} points were sent before)" if part.first else ""
            raise UserError(f"launch=slurm: {refused}{sooner}") from error
        ends.append(end_of(links[-1][0].job_id))
        ids += [job.job_id for job in links[0]]
    return ids


def _record_links(paths: Sequence[Path], links: Sequence[Sequence[Any]], chain: int) -> None:
    """Write the jobs that were sent so far into the folders of their runs."""
    if len(links) == 1:
        record(paths, links[0])
    if chain > 1:
        for path, *jobs in zip(paths, *links, strict=True):
            RunDir(path).write_status(chain=[job.job_id for job in jobs])


def record(paths: Sequence[Path], sent: Sequence[Any], prefix: str = "") -> list[str]:
    """Write the ids and logs of submitit's jobs into the folders of their runs; return the ids."""
    for path, job in zip(paths, sent, strict=True):
        RunDir(path).write_status(job_id=prefix + job.job_id, job_log=str(job.paths.stdout))
    return [prefix + job.job_id for job in sent]


def refusal(error: Exception) -> str:
    """Return the message that SLURM refuses a job, from submitit's error."""
    return f"SLURM refuses the job: {str(error).strip().replace('sbatch: error: ', '')}"


def array_of(job_id: str) -> str:
    """Return the id of the array that a job is an element of, or of the job."""
    return job_id.partition("_")[0]


def end_of(job_id: str) -> str:
    """Return the dependency on the end of a job, or of its array, in whatever way it ends."""
    return f"afterany:{array_of(job_id)}"
