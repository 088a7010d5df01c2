"""The folder of shards that SLURM jobs prepare: how far they are, and the job that stands for all.

Such a folder has, besides its shards, what a run's folder has: `status.json`, `provenance.json`,
`logs/`, and its frozen config, `prepare.yaml`. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunaris.atomic_files import read_json
from lunaris.runs.slurm_client import UNREACHED, JobState

CONFIG = "prepare.yaml"
# The subfolder of an unfinished preparation, and in it the bundles and the note of the merging.
WORK = ".prepare"
BUNDLES = "encoded"
NOTE = "note.json"

_AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_FAILED = (
    "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL",
    "OUT_OF_MEMORY", "REVOKED",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a preparation is, in bytes of its input as the files have them.

    encoded: what is encoded, merged or not. merged: what is in the shards. total: all of the
    input, or 0 where that is unknown before it is read.
    """

    encoded: int
    merged: int
    total: int


def is_preparation(folder: Path) -> bool:
    """Return whether jobs prepare, or prepared, the shards in `folder`."""
    return (folder / CONFIG).is_file()


def bundle_name(source: int, file: int, start: int, size: int) -> str:
    """Return the name of a bundle: where its first chunk begins, and how much input it holds."""
    return f"{source}-{file}-{start}-{size}.bundle"


def bundle_numbers(path: Path) -> tuple[int, int, int, int] | None:
    """Return the numbers of `bundle_name`, or None for a file that is no bundle."""
    numbers = path.stem.split("-")
    if path.suffix != ".bundle" or len(numbers) != 4 or not all(n.isdecimal() for n in numbers):
        return None
    source, file, start, size = map(int, numbers)
    return source, file, start, size


def progress(folder: Path, status: Mapping[str, Any]) -> Progress:
    """Return how far the preparation in a folder with this status.json is."""
    total = _count(status.get("bytes"))
    if status.get("state") == "done":
        return Progress(total, total, total)
    merged = _count(read_json(folder / WORK / NOTE).get("input_bytes"))
    found = (bundle_numbers(path) for path in (folder / WORK / BUNDLES).glob("*.bundle"))
    encoded = merged + sum(numbers[3] for numbers in found if numbers is not None)
    # A bundle that is being merged counts twice for a moment.
    return Progress(min(encoded, total or encoded), merged, total)


def job_ids(status: Mapping[str, Any]) -> list[str]:
    """Return the jobs of a run or a preparation: of the latter, its tasks and then the merging.

    Of a run, those of a chain are in their order.
    """
    chain, last = status.get("chain") or [], status.get("job_id")
    if last in chain:
        return list(chain)
    return [*task_ids(status), *([last] if last else [])]


def task_ids(status: Mapping[str, Any]) -> list[str]:
    """Return the jobs of the tasks that encode; none for a run."""
    found = status.get("task_ids")
    return [i for i in found if isinstance(i, str)] if isinstance(found, list) else []


def leading_job(status: Mapping[str, Any], jobs: Mapping[str, JobState]) -> JobState | None:
    """Return what the jobs of a preparation, or the job of a run, are together.

    jobs: SLURM's states of jobs by their ids; those that it forgot are absent. As long as one of
    the jobs is at work, so is the preparation; then the first task counts that did not end well.
    """
    last = jobs.get(status.get("job_id") or "")
    tasks = [(k, jobs[i]) for k, i in enumerate(task_ids(status)) if i in jobs]
    if not tasks:
        return last
    found = [job for _, job in tasks] + ([last] if last is not None else [])
    for job in found:
        if job.name == UNREACHED:
            return job
    working = next((job for job in found if job.name in _AT_WORK), None)
    if working is not None:
        return working
    waiting = [job for _, job in tasks if job.name in ("PENDING", "CONFIGURING", "REQUEUED")]
    if waiting:
        return waiting[0]
    k = failed_task(status, jobs)
    return last if k is None else jobs[task_ids(status)[k]]


def failed_task(status: Mapping[str, Any], jobs: Mapping[str, JobState]) -> int | None:
    """Return the task that did not end well, rather one that failed itself than a cancelled one."""
    ended = ((k, jobs[i].name) for k, i in enumerate(task_ids(status)) if i in jobs)
    failed = [(name == "CANCELLED", k) for k, name in ended if name in _FAILED]
    return min(failed)[1] if failed else None


def log_of_task(folder: Path, status: Mapping[str, Any], task: int) -> Path:
    """Return the log of the job of a task."""
    return folder / "logs" / "slurm" / f"{task_ids(status)[task]}_0_log.out"


def _count(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0
