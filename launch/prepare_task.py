"""What each job of a preparation runs: the share of one task, or the merging."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import submitit

from lunaris.config.frozen import read_config
from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.data import PreparedDataConfig
from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.data import manifest as manifests
from lunaris.data.prepare.build import spec_of
from lunaris.data.prepare.pipeline import write_shards
from lunaris.data.prepare.share import Share, encode_share
from lunaris.data.prepare.spec import PrepareSpec, require_begun
from lunaris.data.prepare.summary import summary
from lunaris.data.prepared import PreparedData
from lunaris.distributed.signals import StopSignal
from lunaris.errors import EXPECTED, RunFailed, Stopped, ending
from lunaris.launch.requeue import Job
from lunaris.launch.submitit_internals import REQUEUE_EXIT_CODE, SIGNALLED
from lunaris.runs.preparation import CONFIG
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import LOCAL, is_process

_POLL_S = 0.2


class PrepareTask:
    """Encodes one share of the corpus of a folder, or merges all of them, and requeues its job.

    submitit pickles the class by reference, so that the job imports it from the snapshot.
    """

    def __init__(self, folder: Path, share: Share | None, waits_for: tuple[str, ...] = ()) -> None:
        """share: None to merge. waits_for: ids of jobs of this machine that must have ended."""
        self.folder, self.share, self.waits_for = folder, share, waits_for

    def __call__(self) -> None:
        """Do the work. Exits with another code than 0 where it failed or was stopped for good."""
        started, code = time.monotonic(), 0
        run_dir = RunDir(self.folder)
        with StopSignal() as stop:
            try:
                if os.environ.get(SIGNALLED):
                    raise Stopped("before it started")
                self._work(run_dir, lambda: stop.received is not None)
            except Stopped as stopped:
                print(ending("stopped", str(stopped)), flush=True)
                code = self._after_stop(run_dir, time.monotonic() - started)
            except SystemExit:
                raise
            except BaseException as error:
                expected = isinstance(error, EXPECTED)
                said = str(error) if expected else f"{type(error).__name__}: {error}"
                self._fail(run_dir, said)
                if not expected:
                    raise
                print(ending("error", said), file=sys.stderr)
                code = getattr(error, "exit_code", 1)
        if code:
            sys.exit(code)

    def _work(self, run_dir: RunDir, stopped: Callable[[], bool]) -> None:
        self._wait(run_dir, stopped)
        if run_dir.read_status().get("state") != "failed":
            run_dir.write_status(state="running")
        spec = frozen_spec(self.folder)
        if self.share is not None:
            encode_share(spec, self.share, stopped)
            return
        began = time.monotonic()
        if manifests.read(self.folder) is None:
            require_begun(spec)
        made = write_shards(spec, wait_for_lock=True, stopped=stopped)
        print(summary(made, str(self.folder), time.monotonic() - began), flush=True)
        run_dir.write_status(state="done", last_error=None)

    def _wait(self, run_dir: RunDir, stopped: Callable[[], bool]) -> None:
        """Wait for the jobs before this one, as SLURM does for its own."""
        numbers = [int(job_id.removeprefix(LOCAL)) for job_id in self.waits_for]
        while any(map(is_process, numbers)):
            if stopped():
                raise Stopped("before it started")
            time.sleep(_POLL_S)
        if numbers and run_dir.read_status().get("last_error"):
            # As SLURM ends a job that waits for one that failed.
            run_dir.write_status(state="failed")
            sys.exit(RunFailed.exit_code)

    def _after_stop(self, run_dir: RunDir, seconds: float) -> int:
        """Requeue the job unless SLURM does; return the exit code."""
        launch = read_config(self.folder / CONFIG).launch
        assert isinstance(launch, SlurmLaunchConfig)
        job = Job.now(seconds, launch)
        if not job.ours_to_requeue:
            # SLURM has already requeued the job, or someone has cancelled it.
            if self.share is None:
                run_dir.write_status(state="stopped", stop_cause=job.restarts and "preempted")
            return Stopped.exit_code
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if job.timed_out and restarts >= launch.max_num_timeout:
            self._fail(
                run_dir,
                f"reached its time limit after {restarts} restarts (launch.max_num_timeout)",
            )
            return Stopped.exit_code
        refusal = job.requeue()
        if refusal is not None:
            self._fail(run_dir, refusal)
            return Stopped.exit_code
        print("requeued", flush=True)
        return REQUEUE_EXIT_CODE if job.local else 0

    def _fail(self, run_dir: RunDir, reason: str) -> None:
        who = "merging" if self.share is None else f"task {self.share.task}"
        log = submitit.JobEnvironment().paths.stdout
        # On this machine the job that merges ends the preparation, once no other task works.
        ends = self.share is None or os.environ.get("SUBMITIT_EXECUTOR") != "local"
        state = {"state": "failed"} if ends else {}
        run_dir.write_status(last_error=f"{who}: {reason}", job_log=str(log), **state)


def frozen_spec(folder: Path) -> PrepareSpec:
    """Return what the jobs of a folder build. Raises UserError where the input is gone."""
    cfg: Config = read_config(folder / CONFIG)
    return spec_for_jobs(cfg, folder)


def spec_for_jobs(cfg: Config, folder: Path) -> PrepareSpec:
    """Return what jobs with this config build in `folder`, with as many processes as cores."""
    assert isinstance(cfg.data, PreparedDataConfig) and isinstance(cfg.launch, SlurmLaunchConfig)
    cfg.data.dir = str(folder)
    cfg.data.processes = cfg.data.processes or cfg.launch.cpus_per_task
    data: PreparedData = instantiate_component("data", cfg.data)
    return spec_of(data)
