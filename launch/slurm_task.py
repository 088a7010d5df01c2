"""What every task of a submitit job runs: one rank, and its way back into the queue."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from submitit.helpers import TorchDistributedEnvironment
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from lunaris.atomic_files import read_json
from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped
from lunaris.runs import status as jobs
from lunaris.runs.run_dir import RunDir

_FIRST_PORT, _PORTS = 24_500, 8_000
# SLURM looks at time limits twice a minute, and may send the signal a minute before its time.
_SIGNAL_EARLY_S = 60


class Task:
    """What each task of a job runs: the worker, and after a stop the way back into the queue.

    submitit pickles it by reference, so that the job takes this class from the snapshot.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> None:
        """Train as one rank. Exits with the worker's code unless that is 0."""
        started = time.monotonic()
        # From here on, in place of submitit's: a signal that comes while torch is imported, too.
        with StopSignal():
            export_ranks()
            run_dir, rank = RunDir(self.path), int(os.environ["RANK"])
            os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
            error_file = run_dir.logs / f".error_{rank}.json"
            error_file.unlink(missing_ok=True)
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)
            from lunaris.launch.worker import main

            code = main([str(self.path)])
            if code == Stopped.exit_code:
                # Ranks other than 0 leave quietly: one that fails would end rank 0 too.
                code = self._after_stop(run_dir, time.monotonic() - started) if rank == 0 else 0
            elif code:
                _record_failure(run_dir, rank)
        if code:
            sys.exit(code)

    def _after_stop(self, run_dir: RunDir, seconds: float) -> int:
        """Requeue the job if it is for us to do; return the exit code. Rank 0 only."""
        launch = run_dir.read_config().launch
        job = _Job.now(seconds, launch)
        timeouts = run_dir.read_status().get("timeouts", 0) + job.timed_out
        cause = "timeout" if job.timed_out else "preempted"
        if not job.ours_to_requeue:
            # SLURM has requeued it already, or someone cancelled it.
            run_dir.write_status(stop_cause=job.restarts and "preempted")
            return Stopped.exit_code
        if timeouts > launch.max_num_timeout:
            error = f"ran into its time limit {timeouts} times (launch.max_num_timeout)"
            run_dir.write_status(stop_cause="timeout", timeouts=timeouts, last_error=error)
            return Stopped.exit_code
        # Before the requeue, for this process may not live long after it.
        run_dir.write_status(state="queued", stop_cause=None, timeouts=timeouts)
        refusal = job.requeue()
        if refusal is None:
            print(f"requeued: {cause} at step {run_dir.read_status().get('step')}", flush=True)
            return LOCAL_REQUEUE_RETURN_CODE if job.local else 0
        run_dir.write_status(state="stopped", stop_cause=cause, last_error=refusal)
        return Stopped.exit_code


class _Job:
    """The job that this process is in, as SLURM sees it at this moment."""

    def __init__(self, fields: dict[str, str], *, local: bool, timed_out: bool) -> None:
        self.local = local
        self.timed_out = timed_out
        # While it is requeued or cancelled, it is completing already.
        self.ours_to_requeue = timed_out if local else fields.get("JobState") == "RUNNING"
        before = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.restarts = int(fields.get("Restarts", before)) > before

    @classmethod
    def now(cls, seconds: float, launch: Any) -> _Job:
        """Ask SLURM. seconds: how long this process has run."""
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            limit = launch.timeout_min * 60 - launch.signal_delay_s
            return cls({}, local=True, timed_out=seconds >= limit - 1)
        command = ["scontrol", "show", "job", "-o", os.environ["SLURM_JOB_ID"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fields = dict(f.split("=", 1) for f in done.stdout.split() if "=" in f)
        run_s, limit_s = _seconds(fields.get("RunTime")), _seconds(fields.get("TimeLimit"))
        slack = launch.signal_delay_s + _SIGNAL_EARLY_S
        timed_out = run_s is not None and limit_s is not None and run_s >= limit_s - slack
        return cls(fields, local=False, timed_out=timed_out)

    def requeue(self) -> str | None:
        """Put the job back into the queue, with its id; return why that is refused, or None."""
        if self.local:
            return None
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr.strip() or "scontrol requeue failed" if done.returncode else None


def export_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* from the submitit job that this process is in.

    CUDA_VISIBLE_DEVICES stays as SLURM set it.
    """
    TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
    # Below the ports that the kernel gives to clients, among which submitit's choice may fall, and
    # another after a requeue.
    attempt = f"{jobs.current_job_id()}:{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ["MASTER_PORT"] = str(_FIRST_PORT + zlib.crc32(attempt.encode()) % _PORTS)
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def _record_failure(run_dir: RunDir, rank: int) -> None:
    """Put the error of the rank that failed first into status.json; any rank may call this."""
    errors = {}
    for file in run_dir.logs.glob(".error_*.json"):
        message = read_json(file).get("message")
        if isinstance(message, dict):
            errors[int(file.stem.removeprefix(".error_"))] = message
    if not errors:
        return
    first = min(errors, key=lambda r: errors[r]["extraInfo"]["time"])
    where = f"rank {first}: " if os.environ["WORLD_SIZE"] != "1" else ""
    run_dir.write_status(state="failed", last_error=where + errors[first]["message"])


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
