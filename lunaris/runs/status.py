"""Where runs stand: their own files first, then SLURM's queue, then its accounting. No torch.

A run says itself that it runs, is done, failed or was stopped. What it cannot say - that it waits,
was killed, or lost its node - comes from `squeue`, which forgets a job some minutes after its end,
then from `sacct`, which many clusters lack, and last from what SLURM wrote into the job's log.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunaris.atomic_files import read_json
from lunaris.runs.run_dir import RunDir

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
    "missing",
)
ACTIVE = ("queued", "running")
# The job id of what submitit's local executor runs: this and its controller's process id.
LOCAL = "local-"

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
# What SLURM writes into a job's log when it ends it.
_IN_LOG = (
    (r"DUE TO TIME LIMIT", "timeout"),
    (r"DUE TO NODE FAILURE", "node_fail"),
    (r"DUE TO PREEMPTION", "preempted"),
    (r"oom[-_]kill|[Oo]ut [Oo]f [Mm]emory|exceeded .*memory limit", "out_of_memory"),
    (r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED", "cancelled"),
)
_CLIENT_TIMEOUT_S = 30


@dataclass(frozen=True)
class JobState:
    """What SLURM says of one job: its state in SLURM's words, and why."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class RunState:
    """Where a run stands: one of STATES, its status.json, and a remark (why it waits or ended)."""

    state: str
    status: dict[str, Any]
    remark: str = ""

    @property
    def job_id(self) -> str | None:
        return self.status.get("job_id")


def states(paths: Sequence[Path]) -> list[RunState]:
    """Return where each run stands; SLURM is asked once for all of them."""
    statuses = [RunDir(path).read_status() for path in paths]
    ids = [s["job_id"] for s in statuses if s.get("job_id") and s.get("state") != "done"]
    jobs = ask_slurm(i for i in ids if not i.startswith(LOCAL))
    return [
        judge(path, status, jobs.get(status.get("job_id") or ""))
        for path, status in zip(paths, statuses, strict=True)
    ]


def judge(path: Path, status: dict[str, Any], job: JobState | None) -> RunState:
    """Return where the run in `path` stands, from its status.json and what SLURM says of its job.

    `job` is None where there is no job or SLURM knows it no more.
    """
    own, error = status.get("state"), status.get("last_error") or ""
    if own == "done":
        return RunState("done", status)
    if job is not None and job.name in _WAITING:
        return RunState("queued", status, job.reason)
    if job is not None and job.name in _AT_WORK:
        # A job that is completing has nothing to do any more; it may be about to be requeued.
        ending = own in ("failed", "stopped") and job.name == "COMPLETING"
        return _by_own_word(status) if ending else RunState("running", status, job.reason)
    ended = _ENDED.get(job.name, "failed") if job is not None else None
    if ended in ("timeout", "node_fail", "out_of_memory", "preempted", "cancelled"):
        return RunState(ended, status, error or (job.reason if job is not None else ""))
    if status.get("cancelled"):
        return RunState("cancelled", status)
    if own in ("failed", "stopped"):
        return _by_own_word(status)
    if ended is None and own in ACTIVE and _alive(path, status):
        return RunState(str(own), status)
    return _died(path, status, ended)


def ask_slurm(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return what `squeue`, or else `sacct`, says of each job; jobs unknown to both are absent.

    Element 3 of array 7 is "7_3".
    """
    wanted = set(job_ids)
    found = _squeue(wanted) if wanted else {}
    forgotten = {i for i in wanted if _record_of(i, found) is None}
    if forgotten:
        found = _sacct(forgotten) | found
    records = {i: _record_of(i, found) for i in wanted}
    return {i: record for i, record in records.items() if record is not None}


def current_job_id() -> str | None:
    """Return the id of the job that this process belongs to, or None outside any."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return LOCAL + os.environ["SUBMITIT_LOCAL_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended already are passed over.

    Raises RuntimeError with SLURM's words where `scancel` refuses.
    """
    for job_id in job_ids:
        if job_id.startswith(LOCAL):
            _end_local(int(job_id.removeprefix(LOCAL)))
    slurm = sorted(i for i in job_ids if not i.startswith(LOCAL))
    if slurm:
        done = _client("scancel", "--quiet", *slurm)
        if done is None or done.returncode:
            raise RuntimeError(done.stderr.strip() if done else "scancel: not found")


def logs_of(path: Path, status: dict[str, Any]) -> list[Path]:
    """Return the logs of a run, most telling first: its ranks' own, then its job's."""
    ranks = sorted((path / "logs").glob("rank_*.log"))
    job = Path(status["job_log"]) if status.get("job_log") else None
    return ranks + ([job] if job is not None and job.is_file() else [])


def _by_own_word(status: dict[str, Any]) -> RunState:
    state = status["state"]
    if state == "stopped":
        state = status.get("stop_cause") or _by_log(status) or "stopped"
    return RunState(state, status, status.get("last_error") or "")


def _died(path: Path, status: dict[str, Any], ended: str | None) -> RunState:
    """Judge a run that says it waits or runs, but whose job or process is gone."""
    told = _by_log(status) if ended is None else None
    if told is not None:
        return RunState(told, status)
    if status.get("state") == "running":
        return RunState("failed", status, "ended without a word")
    if ended is not None:
        return RunState("failed", status, "the job ended before the run began")
    return RunState("missing", status, "never started" if status.get("job_id") else "")


def _by_log(status: dict[str, Any]) -> str | None:
    text = _last_attempt(Path(status["job_log"])) if status.get("job_log") else ""
    return next((state for pattern, state in _IN_LOG if re.search(pattern, text)), None)


def _last_attempt(job_log: Path) -> str:
    try:
        with job_log.open("rb") as file:
            file.seek(max(0, job_log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # A requeued job writes on in the same file.
    return text.rpartition("Starting with JobEnvironment")[2] or text


def _alive(path: Path, status: dict[str, Any]) -> bool:
    """Say whether a run without a SLURM job still has its process, as far as one can tell here."""
    job_id = status.get("job_id") or ""
    if job_id.startswith(LOCAL):
        return _is_process(int(job_id.removeprefix(LOCAL)))
    if job_id or status.get("state") != "running":
        return False
    attempts = read_json(path / "provenance.json").get("attempts") or [{}]
    if attempts[-1].get("host") != socket.gethostname():
        return True  # Elsewhere: its own word is all there is.
    try:
        holder = re.match(r"process (\d+) ", (path / ".lock").read_text())
    except OSError:
        return False
    return holder is not None and _is_process(int(holder[1]))


def _is_process(pid: int) -> bool:
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
        return True  # No /proc on this system.


def _end_local(shell: int) -> None:
    """Tell the shell of a local job and all it started to end; its ranks save first."""
    done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    parent = {int(pid): int(ppid) for pid, ppid in map(str.split, done.stdout.splitlines())}
    family = {shell}
    while True:
        grown = family | {pid for pid, ppid in parent.items() if ppid in family}
        if grown == family:
            break
        family = grown
    for pid in sorted(family & parent.keys()):
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def _squeue(wanted: set[str]) -> dict[str, JobState]:
    base = ",".join(sorted({i.partition("_")[0] for i in wanted}))
    done = _client("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", base)
    if done is None or done.returncode:
        return {}  # No SLURM here, or it knows none of these jobs any more.
    return _parse(done.stdout)


def _sacct(wanted: set[str]) -> dict[str, JobState]:
    base = ",".join(sorted({i.partition("_")[0] for i in wanted}))
    done = _client("sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode", "-j", base)
    if done is None or done.returncode:
        return {}  # A cluster without accounting.
    return _parse(done.stdout)


def _parse(text: str) -> dict[str, JobState]:
    """Read lines of `id|STATE|reason`."""
    found = {}
    for line in text.splitlines():
        job_id, state, reason = (line.split("|") + ["", ""])[:3]
        reason = "" if reason in ("None", "0:0") else reason
        for one in _elements(job_id.strip()):
            # "CANCELLED by 1000" is CANCELLED.
            found[one] = JobState(state.split()[0] if state else "", reason)
    return found


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
    # The elements of an array that never started are one record, under the array's own id.
    return found.get(job_id) or found.get(job_id.partition("_")[0])


def _client(*command: str) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_CLIENT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
