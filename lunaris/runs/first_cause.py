"""Why a job of several ranks failed: the rank that failed first, and how. No torch.

A rank that raises an error or that finds another one hung writes `logs/.error_K.json`. A rank that
the kernel kills writes nothing; `srun` names it in the job's log. The other ranks then lose their
connections to it, and write errors that are consequences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunaris.atomic_files import read_json

_LOG_END = 1 << 18  # Bytes of a job's log that are read.
_FIRST_LINE = "Starting with JobEnvironment"
# What srun prints of the tasks that a signal ended: `srun: error: node1: tasks 2-3: Killed`.
_BY_SIGNAL = re.compile(
    r"^srun: error: \S+: tasks? (\d+)[\d,-]*: "
    r"(Killed|Out Of Memory|Segmentation fault|Aborted|Bus error|Illegal instruction)",
    re.MULTILINE,
)
# Before these lines no task has been ended by SLURM itself.
_ENDED_BY_SLURM = re.compile(
    r"CANCELLED AT|Terminating StepId|Job step aborted|Force Terminated", re.MULTILINE
)
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|Out Of Memory|exceeded .*memory limit")
# A hung rank, as the heartbeat of another one names it.
_HUNG = re.compile(r"rank (\d+) has sent no heartbeat|the furthest behind: rank (\d+) \([^)]*\)$")


@dataclass(frozen=True)
class FirstCause:
    """The rank that failed first, the state of the run that follows, and what happened."""

    rank: int
    state: str
    message: str


def first_cause(path: Path, status: dict[str, Any]) -> FirstCause | None:
    """Return what made the last attempt of the run in `path` fail, or None where nothing tells."""
    errors = recorded_errors(path / "logs")
    killed = _killed_first(Path(status.get("job_log") or ""))
    if killed is not None and killed.rank not in errors:
        return killed
    if not errors:
        return None
    rank = min(errors, key=lambda r: (errors[r]["extraInfo"]["time"], r))
    message = str(errors[rank]["message"])
    hung = _HUNG.search(message)
    if hung is not None:
        return FirstCause(int(hung[1] or hung[2]), "failed", message)
    return FirstCause(rank, "failed", f"rank {rank}: {message}")


def recorded_errors(logs: Path) -> dict[int, dict[str, Any]]:
    """Return the errors that ranks wrote into a run's folder of logs, by rank."""
    errors = {}
    for file in logs.glob(".error_*.json"):
        message = read_json(file).get("message")
        rank = file.stem.removeprefix(".error_")
        if isinstance(message, dict) and rank.isdecimal():
            errors[int(rank)] = message
    return errors


def last_attempt(job_log: Path) -> str:
    """Return what the job's log holds of its last attempt, or "" where there is no log."""
    try:
        with job_log.open("rb") as file:
            file.seek(max(0, job_log.stat().st_size - _LOG_END))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # A requeued job appends to the same file.
    return text.rpartition(_FIRST_LINE)[2] or text


def _killed_first(job_log: Path) -> FirstCause | None:
    """Return the rank that a signal ended before SLURM ended the others, as srun names it."""
    text = last_attempt(job_log)
    ended = _ENDED_BY_SLURM.search(text)
    early = text[: ended.start()] if ended is not None else text
    found = _BY_SIGNAL.search(early)
    if found is None:
        return None
    rank, how = int(found[1]), found[2]
    # The step's daemon prints its line at the end of the step.
    if how in ("Killed", "Out Of Memory") and _OUT_OF_MEMORY.search(text):
        return FirstCause(rank, "out_of_memory", f"rank {rank}: out of memory")
    if how == "Killed":
        how = "killed by SIGKILL, as the kernel does when a machine's memory is full"
    return FirstCause(rank, "failed", f"rank {rank}: {how}")
