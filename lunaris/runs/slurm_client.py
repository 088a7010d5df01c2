"""SLURM's commands: what `squeue` and `sacct` report of jobs, `scancel`, and a test of scripts.

The jobs of submitit's local executor are known here too: their ids are `LOCAL` and the process id
of their controller, and they are cancelled by a signal.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LOCAL = "local-"
# The name of the state of a job of which SLURM says nothing because it does not answer.
UNREACHED = "UNREACHED"
_TIMEOUT_S = 30
# Seconds between the tries to get a list that SLURM refuses, as a busy or restarting one does.
_WAITS_S = (0.5, 1.0, 2.0)
# What squeue may show, without a reason, of a job that is being requeued; seconds until it is asked
# again.
_REQUEUES_S = (1.0, 1.0)
# How SLURM says that it knows none of the jobs; anything else is no answer.
_FORGOTTEN = "Invalid job id"
# What the controller says of a script that it will never run, however long the job waits.
_REFUSED = re.compile(
    r"invalid|configuration is not available|can ?not be satisfied|not permitted|denied|"
    r"more processors requested|problem",
    re.IGNORECASE,
)
_SQUEUE = ("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j")
_SACCT = ("sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode", "-j")


@dataclass(frozen=True)
class JobState:
    """The state of a job in SLURM's words, and the reason that SLURM gives for it."""

    name: str
    reason: str = ""


_PASSING = (JobState("CANCELLED"), JobState("PREEMPTED"))


def ask_slurm(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return what `squeue`, or else `sacct`, says of each job; jobs that SLURM forgot are absent.

    A job that `sacct` does not know has the state UNREACHED where `squeue` does not answer: it may
    wait or run. Element 3 of array 7 is "7_3".
    """
    wanted = set(job_ids)
    found, silence = _ask(_SQUEUE, wanted, _WAITS_S) if wanted else ({}, None)
    for wait_s in _REQUEUES_S:
        passing = {i for i in wanted if _record_of(i, found) in _PASSING}
        if not passing:
            break
        time.sleep(wait_s)
        found |= _ask(_SQUEUE, passing, ())[0]
    forgotten = {i for i in wanted if _record_of(i, found) is None}
    if forgotten:
        # Many clusters have no accounting, so that its silence means nothing.
        found = _ask(_SACCT, forgotten, ())[0] | found
    records = {i: _record_of(i, found) for i in sorted(wanted)}
    if silence is not None:
        records = {i: r or JobState(UNREACHED, silence) for i, r in records.items()}
    return {i: record for i, record in records.items() if record is not None}


def current_job_id() -> str | None:
    """Return the id of the job that this process belongs to, or None outside any."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return LOCAL + os.environ["SUBMITIT_LOCAL_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def refusal_of(script: str) -> str | None:
    """Return why SLURM refuses a job with this script, or None where it would take it.

    `sbatch --test-only` tests the script and sends nothing. What it only says of jobs that would
    wait, like busy or drained nodes, is no refusal; nor is its silence.
    """
    done = _client("sbatch", "--test-only", stdin=script)
    if done is None or done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [re.sub(r"^(sbatch: error|allocation failure): ", "", line.strip()) for line in lines]
    # sbatch does not ask the controller where it cannot read an option.
    asked = any(line.startswith("allocation failure") for line in lines)
    if asked and not _REFUSED.search(said[-1]):
        return None
    return "; ".join(dict.fromkeys(said)) or f"sbatch ended with exit code {done.returncode}"


def max_array_size() -> int | None:
    """Return the number of jobs in SLURM's largest array, or None where it does not say."""
    done = _client("scontrol", "show", "config")
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE) if done else None
    return int(match[1]) or None if match else None


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have already ended are ignored.

    Raises RuntimeError with SLURM's message where `scancel` refuses.
    """
    for job_id in job_ids:
        if job_id.startswith(LOCAL):
            _terminate_family(int(job_id.removeprefix(LOCAL)))
    slurm = sorted(i for i in job_ids if not i.startswith(LOCAL))
    if slurm:
        done = _client("scancel", "--quiet", *slurm)
        if done is None or done.returncode:
            raise RuntimeError(done.stderr.strip() if done else "scancel: not found")


def is_process(pid: int) -> bool:
    """Return whether a process of this machine runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True  # This system has no /proc.


def _terminate_family(root: int) -> None:
    """Send SIGTERM to a process and to all its descendants; ranks then save a checkpoint."""
    done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    parent = {int(pid): int(ppid) for pid, ppid in map(str.split, done.stdout.splitlines())}
    family = {root}
    while children := {pid for pid, ppid in parent.items() if ppid in family} - family:
        family |= children
    for pid in sorted(family & parent.keys()):
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def _ask(
    command: tuple[str, ...], wanted: set[str], waits_s: Sequence[float]
) -> tuple[dict[str, JobState], str | None]:
    """Return the states in the lines of `id|STATE|reason` that a command prints of jobs.

    Also returns None, or why there is no answer after a try more for each of `waits_s`.
    """
    command = (*command, ",".join(sorted({i.partition("_")[0] for i in wanted})))
    done = _client(*command)
    for wait_s in waits_s:
        # A client that is absent or took all the time is not tried again.
        if done is None or not done.returncode or _FORGOTTEN in done.stderr:
            break
        time.sleep(wait_s)
        done = _client(*command)
    if done is None:
        here = shutil.which(command[0]) is not None
        said = f"did not answer in {_TIMEOUT_S} s" if here else "is not on the PATH"
        return {}, f"{command[0]} {said}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {}, None if _FORGOTTEN in done.stderr else f"{command[0]}: {lines[-1]}"
    found: dict[str, JobState] = {}
    for line in done.stdout.splitlines():
        job_id, state, reason = (line.split("|") + ["", ""])[:3]
        reason = "" if reason in ("None", "0:0") else reason
        for element in _elements(job_id.strip()):
            # "CANCELLED by 1000" is CANCELLED.
            found[element] = JobState(state.split()[0] if state else "", reason)
    return found, None


def _elements(job_id: str) -> list[str]:
    """Return the ids that `7_[0-2,5%4]` stands for; other ids stand for themselves."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job_id)
    if match is None:
        return [job_id]
    ids = []
    for part in match[2].split(","):
        low, _, high = part.partition("-")
        ids += [f"{match[1]}_{i}" for i in range(int(low), int(high or low) + 1)]
    return ids


def _record_of(job_id: str, found: dict[str, JobState]) -> JobState | None:
    # Array elements that never started share one record, under the id of the array.
    return found.get(job_id) or found.get(job_id.partition("_")[0])


def _client(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
