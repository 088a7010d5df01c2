"""The SLURM job of this process as SLURM reports it, and how it is put back into the queue.

Standard library only: the script of a job uses it too, by a python that may lack all else.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunaris.runs.slurm_client import current_job_id

if TYPE_CHECKING:
    from lunaris.config.schema.launch import SlurmLaunchConfig

# SLURM checks time limits twice a minute, and may send the signal up to a minute early.
_SIGNAL_EARLY_S = 60
# How often a change of a job that is being requeued is tried: less than SLURM's KillWait together.
_UPDATES = 20
_BETWEEN_S = 0.5
# Seconds between the tries of a question to SLURM; together less than a job has to save and leave.
_WAITS_S = (0.5, 1.0, 2.0)
# How SLURM's commands say that the controller is not reached.
_UNREACHED = re.compile(r"contact|timed out|connect|communicat|zero bytes|standby", re.IGNORECASE)


@dataclass
class Job:
    """The job of this process, as SLURM reports it now.

    ours_to_requeue: whether nobody else requeues or ends it. restarts: whether SLURM counts a
    restart that has not happened yet.
    """

    local: bool
    timed_out: bool
    ours_to_requeue: bool
    restarts: bool = False

    @classmethod
    def now(cls, seconds: float, launch: SlurmLaunchConfig) -> Job:
        """Ask SLURM for the job of this process. seconds: how long the process has run."""
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            timed_out = seconds >= launch.timeout_min * 60 - launch.signal_delay_s - 1
            return cls(local=True, timed_out=timed_out, ours_to_requeue=timed_out)
        fields = _shown()
        run_s, limit_s = _seconds(fields.get("RunTime")), _seconds(fields.get("TimeLimit"))
        slack = launch.signal_delay_s + _SIGNAL_EARLY_S
        timed_out = run_s is not None and limit_s is not None and run_s >= limit_s - slack
        before = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        restarts = int(fields.get("Restarts", before)) > before
        return cls(False, timed_out, _at_work(fields), restarts)

    def requeue(self) -> str | None:
        """Put the job back into the queue under its id; return SLURM's refusal, or None."""
        if self.local:
            return None
        return requeue()


def is_running() -> bool:
    """Return whether nobody has ended the job of this process or has put it back into the queue."""
    return _at_work(_shown())


def requeue() -> str | None:
    """Put the job of this process back into the queue; return SLURM's refusal, or None."""
    return _requeued_by("requeue")


def requeue_without(nodes: Iterable[str]) -> str | None:
    """Put the job of this process back into the queue, never to run on some nodes again.

    Returns SLURM's refusal, or None. SLURM changes the nodes of a pending job alone, so the job is
    held until it has become one, while SLURM already ends this process: SIGTERM is ignored from now
    on.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job_id, excluded = _job_id(), _shown().get("ExcNodeList")
    refusal = _requeued_by("requeuehold")
    if refusal is not None:
        return refusal
    names = [excluded] if excluded and excluded != "(null)" else []
    for _ in range(_UPDATES):
        refusal = _scontrol(
            "update", f"jobid={job_id}", f"excnodelist={','.join([*names, *nodes])}"
        )
        if refusal is None:
            break
        time.sleep(_BETWEEN_S)
    return _scontrol("release", job_id) or refusal


def exclude(job_ids: Iterable[str], nodes: Iterable[str]) -> str | None:
    """Let pending jobs run on other nodes; return SLURM's refusal, or None."""
    refusals = [
        _scontrol("update", f"jobid={job_id}", f"excnodelist={','.join(nodes)}")
        for job_id in job_ids
    ]
    return next((refusal for refusal in refusals if refusal is not None), None)


def _job_id() -> str:
    """Return the id of the job of this process.

    The last task of an array has the number of the array in SLURM_JOB_ID, which stands for all of
    its tasks.
    """
    return current_job_id() or ""


def _requeued_by(command: str) -> str | None:
    """Requeue the job of this process by a command of `scontrol`; return a refusal, or None.

    Where the answer of a first try was lost, SLURM refuses a second one of what it has done.
    """
    refusal = _scontrol(command, _job_id())
    return None if refusal is not None and not is_running() else refusal


def _scontrol(*arguments: str) -> str | None:
    """Call `scontrol`; return its message where it refuses, or None."""
    done = _answer_of("scontrol", *arguments)
    # A signal that ends scontrol comes from the requeue that it has caused.
    if done.returncode <= 0:
        return None
    return done.stderr.strip() or f"scontrol {arguments[0]} failed"


def _shown() -> dict[str, str]:
    """Return what SLURM shows of the job of this process by names; {} without an answer."""
    done = _answer_of("scontrol", "show", "job", "-o", _job_id())
    return dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)


def _at_work(fields: Mapping[str, str]) -> bool:
    """Return whether a job runs, from what SLURM shows of it.

    A job that is being requeued or cancelled is already COMPLETING. Where SLURM does not answer,
    the job is taken to be running: to give it up would lose it.
    """
    return fields.get("JobState", "RUNNING") == "RUNNING"


def _answer_of(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command; again after a moment, a few times, while the controller is not reached.

    A busy one does not answer at once.
    """
    done = _run(command)
    for wait_s in _WAITS_S:
        if done.returncode <= 0 or not _UNREACHED.search(done.stderr):
            break
        time.sleep(wait_s)
        done = _run(command)
    return done


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:  # A container's image may lack SLURM's commands.
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _seconds(text: str | None) -> int | None:
    """Read SLURM's `[days-]hours:minutes:seconds`; None for UNLIMITED and the like."""
    days, _, clock = (text or "").rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]):
        return None
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return int(days or 0) * 86400 + total
