"""What each task of a submitit job runs: one rank of a run, and the requeue after a stop."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped
from lunaris.launch.free_port import first_port
from lunaris.launch.job_environment import RUN_FILE
from lunaris.launch.requeue import Job
from lunaris.launch.submitit_internals import REQUEUE_EXIT_CODE, SIGNALLED
from lunaris.launch.worker import main
from lunaris.runs.first_cause import recorded_errors
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import current_job_id


class Task:
    """Trains one rank of the run in `path`, and requeues the job after a stop.

    submitit pickles the class by reference, so that the job imports it from the snapshot.
    """

    def __init__(self, path: Path, link: int = 1, links: int = 1) -> None:
        """link: the number of this job among the `links` that are sent for the run."""
        self.path = path
        self.link, self.links = link, links

    def __call__(self) -> None:
        """Train as one rank. Exits with the worker's code unless that is 0."""
        started = time.monotonic()
        # From the start, in place of submitit's handler, so that a signal during the import of
        # torch is handled too.
        with StopSignal():
            export_ranks()
            run_dir, rank = RunDir(self.path), int(os.environ["RANK"])
            code = self._code_of_nothing_to_do(run_dir) if self.link > 1 else None
            if code is None:
                code = self._train(run_dir, rank, started)
        if code:
            sys.exit(code)

    def _train(self, run_dir: RunDir, rank: int, started: float) -> int:
        """Train as one rank; return the exit code, after what follows a stop or a failure."""
        if rank == 0:
            self._begin(run_dir)
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        error_file = run_dir.logs / f".error_{rank}.json"
        error_file.unlink(missing_ok=True)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if rank == 0:
            # Those of an earlier attempt with more ranks would tell of this one.
            for other in (r for r in recorded_errors(run_dir.logs) if r >= world_size):
                (run_dir.logs / f".error_{other}.json").unlink(missing_ok=True)
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)
        code = self._stopped_before() or main([str(self.path)])
        if code == Stopped.exit_code:
            # The other ranks exit with 0: a rank that fails would end rank 0 too.
            return self._after_stop(run_dir, time.monotonic() - started) if rank == 0 else 0
        if code:
            _record_failure(run_dir, rank)
        return code

    def _code_of_nothing_to_do(self, run_dir: RunDir) -> int | None:
        """Return the exit code of a later job of a chain that does not train, else None."""
        status = run_dir.read_status()
        if status.get("state") in FINISHED:
            return 0
        # The run may have been sent again since, so that other jobs train it.
        ours = current_job_id() in (status.get("chain") or [])
        return None if ours and not status.get("cancelled") else 1

    def _begin(self, run_dir: RunDir) -> None:
        """Tell the script which run the job trains, and the run's folder which job does."""
        if os.environ.get(RUN_FILE):
            Path(os.environ[RUN_FILE]).write_text(str(self.path))
        if self.links > 1:
            log = str(JobEnvironment().paths.stdout)
            run_dir.write_status(job_id=current_job_id(), job_log=log)

    def _stopped_before(self) -> int:
        """Return the code of a stop where a signal came before the script's tasks, else 0."""
        if not os.environ.get(SIGNALLED):
            return 0
        print("stopped by a signal before the run started", flush=True)
        if os.environ["RANK"] == "0":
            RunDir(self.path).write_status(state="stopped")
        return Stopped.exit_code

    def _after_stop(self, run_dir: RunDir, seconds: float) -> int:
        """Requeue the job unless SLURM does; return the exit code. Only rank 0 may call this."""
        launch: Any = run_dir.read_config().launch  # A custom one need not be of our schema.
        job = Job.now(seconds, launch)
        timeouts = run_dir.read_status().get("timeouts", 0) + job.timed_out
        cause = "timeout" if job.timed_out else "preempted"
        if self.links > 1:
            return self._leave_to_next(run_dir, cause, timeouts)
        if not job.ours_to_requeue:
            # SLURM has already requeued the job, or someone has cancelled it.
            run_dir.write_status(stop_cause=job.restarts and "preempted")
            return Stopped.exit_code
        if timeouts > launch.max_num_timeout:
            error = f"reached its time limit {timeouts} times (launch.max_num_timeout)"
            run_dir.write_status(stop_cause="timeout", timeouts=timeouts, last_error=error)
            return Stopped.exit_code
        # Before the requeue, because SLURM may kill this process soon after it.
        run_dir.write_status(state="queued", stop_cause=None, timeouts=timeouts)
        refusal = job.requeue()
        if refusal is None:
            print(f"requeued: {cause} at step {run_dir.read_status().get('step', 0)}", flush=True)
            return REQUEUE_EXIT_CODE if job.local else 0
        run_dir.write_status(state="stopped", stop_cause=cause, last_error=refusal)
        return Stopped.exit_code

    def _leave_to_next(self, run_dir: RunDir, cause: str, timeouts: int) -> int:
        """Leave the run to the next job of the chain; return the exit code."""
        status = run_dir.read_status()
        if status.get("cancelled") or self.link == self.links:
            cancelled = bool(status.get("cancelled"))
            run_dir.write_status(stop_cause=None if cancelled else cause, timeouts=timeouts)
            return Stopped.exit_code
        run_dir.write_status(state="queued", stop_cause=None, timeouts=timeouts)
        at = f"{cause} at step {status.get('step', 0)}"
        print(f"left to job {self.link + 1} of {self.links}: {at}", flush=True)
        return 0


def export_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* from the submitit job of this process.

    CUDA_VISIBLE_DEVICES stays as SLURM set it.
    """
    TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
    # The script has found a free port on the first node. The scripts of other launchers have not;
    # there it is a port that the kernel gives to no client, and a different one after a requeue.
    attempt = f"{current_job_id()}:{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ["MASTER_PORT"] = os.environ.get("LUNARIS_MASTER_PORT") or str(first_port(attempt))
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def _record_failure(run_dir: RunDir, rank: int) -> None:
    """Write the error of the rank that failed first to status.json. Any rank may call this."""
    errors = recorded_errors(run_dir.logs)
    if not errors:
        return
    first = min(errors, key=lambda r: (errors[r]["extraInfo"]["time"], r))
    where = f"rank {first}: " if os.environ["WORLD_SIZE"] != "1" else ""
    run_dir.write_status(state="failed", last_error=where + errors[first]["message"])
