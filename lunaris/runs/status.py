"""The state of runs, from their own files, SLURM's queue and its accounting. No torch.

A run itself writes that it runs, is done, failed or was stopped. It cannot write that it waits, was
killed, or lost its node. That comes from `squeue`, which forgets a job some minutes after its end,
then from `sacct`, which many clusters lack, and last from what SLURM wrote into the job's log.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.errors import UserError
from lunaris.runs.discovery import expected_runs
from lunaris.runs.first_cause import FirstCause, first_cause, last_attempt
from lunaris.runs.preparation import failed_task, job_ids, leading_job, log_of_task
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import LOCAL, UNREACHED, JobState, ask_slurm, is_process

if TYPE_CHECKING:
    from lunaris.config.schema.root import Config

# In the order in which they are printed.
STATES = (
    "queued",
    "running",
    "done",
    "failed",
    "timeout",
    "preempted",
    "node_fail",
    "out_of_memory",
    "cancelled",
    "stopped",
    "paused",
    "missing",
    "unknown",
)
ACTIVE = ("queued", "running")

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_ENDED = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "node_fail",
    "OUT_OF_MEMORY": "out_of_memory",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "COMPLETED": "completed",
    "FAILED": "failed",
}
# What SLURM writes into the log of a job that it ends.
_IN_LOG = (
    (r"DUE TO TIME LIMIT", "timeout"),
    (r"DUE TO NODE FAILURE", "node_fail"),
    (r"DUE TO PREEMPTION", "preempted"),
    (r"oom[-_]kill|[Oo]ut [Oo]f [Mm]emory|exceeded .*memory limit", "out_of_memory"),
    (r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED", "cancelled"),
)
# How a run ended that others waited for.
_IN_WORDS = {
    "timeout": "reached its time limit",
    "preempted": "was preempted",
    "node_fail": "lost its node",
    "out_of_memory": "ran out of memory",
    "cancelled": "was cancelled",
    "stopped": "was stopped",
    "missing": "never started",
}


@dataclass(frozen=True)
class RunState:
    """The state of a run (one of STATES), its status.json, and why it waits or ended."""

    state: str
    status: dict[str, Any]
    remark: str = ""

    @property
    def job_id(self) -> str | None:
        return self.status.get("job_id")

    @property
    def job_ids(self) -> list[str]:
        """The jobs that were sent for the run at once, in their order: several of a chain."""
        return job_ids(self.status)

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        """Whether the run is neither queued nor running, and SLURM says so."""
        return self.state not in (*ACTIVE, "unknown")


def resolve_states(paths: Sequence[Path]) -> list[RunState]:
    """Return the state of each run; SLURM is asked once for all of them."""
    statuses = [RunDir(path).read_status() for path in paths]
    waiting = [status for status in statuses if status.get("state") not in FINISHED]
    ids = [i for status in waiting for i in job_ids(status)]
    jobs = ask_slurm(i for i in ids if not i.startswith(LOCAL))
    return [_resolve(path, status, jobs) for path, status in zip(paths, statuses, strict=True)]


def _resolve(path: Path, status: dict[str, Any], jobs: dict[str, JobState]) -> RunState:
    """Return the state of a run, or of a preparation with the task that made it fail."""
    job, task = _current(status, jobs), failed_task(status, jobs)
    if task is None or status.get("last_error"):
        return resolve_state(path, status, job)
    # The task could not write why; its log may tell.
    known = status | {"job_log": str(log_of_task(path, status, task))}
    state = resolve_state(path, known, job)
    if state.active or state.state in ("done", "cancelled", "unknown") or job is None:
        return resolve_state(path, status, job)
    return replace(state, remark=f"task {task}: {state.remark or job.name}")


def _current(status: dict[str, Any], jobs: dict[str, JobState]) -> JobState | None:
    """Return SLURM's state of the job that runs or waits for a run, else of the last one that ran.

    Of a chain, each job waits for the end of the one before.
    """
    found = [jobs[i] for i in status.get("chain") or [] if i in jobs]
    active = [job for job in found if job.name in (*_WAITING, *_AT_WORK, UNREACHED)]
    if active and status.get("job_id") in status["chain"]:
        return min(active, key=lambda job: job.name == "COMPLETING")
    return leading_job(status, jobs)


def has_trained(path: Path, cfg: Config) -> bool:
    """Return whether the run in `path` is done, or paused where `cfg` says or later."""
    status = RunDir(path).read_status()
    paused = status.get("state") == "paused" and status.get("step", 0) >= cfg.trainer.end()
    return paused or status.get("state") == "done"


def refuse_active(path: Path) -> None:
    """Raise UserError while the run in `path` is queued or running as a job, or may be."""
    (state,) = resolve_states([path])
    refuse_unknown([path], [state])
    if state.active and state.job_id:
        raise UserError(
            f"{path}: is already {state.state}, as job {state.job_id}; `lunaris cancel "
            f"{shlex.quote(str(path))}` cancels it"
        )


def refuse_unknown(paths: Sequence[Path], states: Sequence[RunState]) -> None:
    """Raise UserError where one of the runs may have a job, but SLURM does not say."""
    for path, state in zip(paths, states, strict=True):
        if state.state == "unknown":
            raise UserError(
                f"{path}: whether job {state.job_id} still waits or runs is unknown, because SLURM "
                f"does not answer ({state.remark}). Try again where SLURM's commands work; if the "
                f'job is known to be gone, write "state": "stopped" into {path / "status.json"}'
            )


def resolve_state(path: Path, status: dict[str, Any], job: JobState | None) -> RunState:
    """Return the state of the run in `path` from its status.json and SLURM's state of its job.

    `job` is None where the run has no job or SLURM has forgotten it, and UNREACHED where SLURM does
    not answer.
    """
    written, error = status.get("state"), status.get("last_error") or ""
    if written in FINISHED:
        return RunState(str(written), status)
    if job is not None and job.name == UNREACHED:
        if _may_have_job(status):
            return RunState("unknown", status, job.reason)
        job = None
    if job is not None and job.name in _WAITING:
        return RunState("queued", status, job.reason)
    requeued = written == "stopped" and status.get("stop_cause") == "preempted" and not error
    if requeued and job is not None and job.name in ("COMPLETING", "PREEMPTED"):
        # SLURM has counted the restart; the job is pending again when its nodes are free.
        return RunState("queued", status, "being requeued")
    if job is not None and job.name in _AT_WORK:
        # The run has ended, but its job may be about to be requeued.
        ending = written in ("failed", "stopped") and job.name == "COMPLETING"
        return _as_written(path, status) if ending else RunState("running", status, job.reason)
    ended = _ENDED.get(job.name, "failed") if job is not None else None
    if ended == "cancelled":
        return RunState(ended, status, _unmet(path, status) or error)
    if ended in ("timeout", "node_fail", "out_of_memory", "preempted"):
        return RunState(ended, status, error or (job.reason if job is not None else ""))
    if status.get("cancelled"):
        return RunState("cancelled", status)
    unmet = _unmet(path, status) if ended is None else ""
    if unmet:
        return RunState("cancelled", status, unmet)
    if written in ("failed", "stopped"):
        return _as_written(path, status)
    if ended is None and written in ACTIVE and _has_process(path, status):
        return RunState(str(written), status)
    return _died(path, status, ended)


def _unmet(path: Path, status: dict[str, Any]) -> str:
    """Return which run did not end well for which the job of a run waited, and how; or ""."""
    if status.get("state") != "queued" or status.get("cancelled"):
        return ""
    for folder in status.get("after") or []:
        awaited = Path(os.path.normpath(path / folder))
        try:
            paths = [run.path for run in expected_runs(awaited)]
        except UserError:  # Nothing is left there.
            paths = [awaited]
        for other, state in zip(paths, resolve_states(paths), strict=True):
            if state.ended and state.state not in FINISHED:
                return f"{other}, for which it waited, {_IN_WORDS.get(state.state, state.state)}"
    return ""


def _may_have_job(status: dict[str, Any]) -> bool:
    """Return whether the job of a run may wait or run, as far as the run's own files tell."""
    if status.get("cancelled"):
        return False
    later = job_ids(status)[-1:] not in ([], [status.get("job_id")])
    if later and status.get("state") in ACTIVE:
        return True
    logged = _from_log(status)
    if logged in ("preempted", "node_fail"):
        return True  # SLURM requeues such jobs, also where the run has written that it failed.
    if status.get("state") in ACTIVE:
        return logged is None
    return status.get("stop_cause") == "preempted"


def logs_of(path: Path, status: dict[str, Any]) -> list[Path]:
    """Return the logs of a run, the most informative first: those of its ranks, then its job's."""
    files = (log for log in (path / "logs").glob("rank_*.log") if log.is_file())
    ranks = sorted(files, key=lambda log: (len(log.name), log.name))
    failed = status.get("state") in ("failed", "running") and len(ranks) > 1
    cause = _cause(path, status) if failed else None
    if cause is not None:
        # The others keep their order.
        ranks.sort(key=lambda log: log.name != f"rank_{cause.rank}.log")
    job = Path(status["job_log"]) if status.get("job_log") else None
    return ranks + ([job] if job is not None and job.is_file() else [])


def last_line(logs: Sequence[Path]) -> str:
    """Return the last line with text of the first log that has any, or an empty string."""
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        text = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if text:
            return text
    return ""


def _as_written(path: Path, status: dict[str, Any]) -> RunState:
    """Return the state that a failed or stopped run wrote itself, with the cause of a stop."""
    state = status["state"]
    if state == "stopped":
        state = status.get("stop_cause") or _from_log(status) or "stopped"
    cause = _cause(path, status) if state == "failed" else None
    if cause is not None:
        return RunState(cause.state, status, cause.message)
    return RunState(state, status, status.get("last_error") or "")


def _died(path: Path, status: dict[str, Any], ended: str | None) -> RunState:
    """Return the state of a run that wrote `queued` or `running`, but has no job and no process."""
    cause = _cause(path, status) if status.get("state") == "running" else None
    if cause is not None:
        return RunState(cause.state, status, cause.message)
    logged = _from_log(status) if ended is None else None
    if logged is not None:
        return RunState(logged, status)
    if status.get("state") == "running":
        return RunState("failed", status, "the process disappeared without an error")
    if ended is not None:
        return RunState("failed", status, "the job ended before the run started")
    return RunState("missing", status, "never started" if status.get("job_id") else "")


def _from_log(status: dict[str, Any]) -> str | None:
    """Return the state that the job's log names for its last attempt, or None."""
    text = last_attempt(Path(status.get("job_log") or ""))
    return next((state for pattern, state in _IN_LOG if re.search(pattern, text)), None)


def _cause(path: Path, status: dict[str, Any]) -> FirstCause | None:
    """Return why the job of a run failed, where the files of its ranks and of the job tell."""
    cause = first_cause(path, status) if status.get("job_id") else None
    if cause is None or len(list((path / "logs").glob("rank_*.log"))) > 1:
        return cause
    return replace(cause, message=cause.message.removeprefix("rank 0: "))


def _has_process(path: Path, status: dict[str, Any]) -> bool:
    """Return whether a run without a SLURM job still has its process, as far as is known here."""
    job_id = status.get("job_id") or ""
    if job_id.startswith(LOCAL):
        number = job_id.removeprefix(LOCAL)
        return number.isdecimal() and is_process(int(number))
    if job_id or status.get("state") != "running":
        return False
    attempts = RunDir(path).noted("attempts") or [{}]
    if attempts[-1].get("host") != socket.gethostname():
        return True  # It runs on another machine, whose processes cannot be seen from here.
    try:
        holder = re.match(r"process (\d+) ", (path / ".lock").read_text(errors="replace"))
    except OSError:
        return False
    return holder is not None and is_process(int(holder[1]))
