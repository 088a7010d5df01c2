"""Runs sent to SLURM, or rehearsed on this machine, by submitit. The only file that imports it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from submitit.slurm.slurm import _make_sbatch_string

from lunaris import jobs, rundir
from lunaris.config.schema import SlurmLaunchConfig
from lunaris.config.world import tasks_per_node
from lunaris.errors import UserError
from lunaris.launch import snapshot
from lunaris.rundir import RunDir, read_json
from lunaris.signals import StopSignal

_WRONG_INPUT, _STOPPED = 2, 3
_POLL_S = 2.0
_FIRST_PORT, _PORTS = 24_500, 8_000
# SLURM looks at time limits twice a minute, and may send the signal a minute before its time.
_SIGNAL_EARLY_S = 60


class Slurm:
    """Sends runs as jobs in which every task is one rank; keys as `launch=slurm` has them."""

    def __init__(self, **keys: Any) -> None:
        self.keys = SlurmLaunchConfig(**keys)
        if self.keys.cluster == "local" and self.keys.nodes > 1:
            raise UserError(
                f"launch.nodes={self.keys.nodes}: must be 1 with launch.cluster=local, which runs "
                "the job on this machine"
            )

    @classmethod
    def of(cls, cfg: Any) -> Slurm:
        """Return the launcher that the `launch` group of a run's config describes."""
        return cls(**{str(key): value for key, value in cfg.launch.items() if key != "_target_"})

    def submit(self, cfg: Any, command: str, overrides: list[str]) -> int:
        """Freeze the run's folder, send it and return; with `wait`, return once it has ended.

        Returns the exit code: 0 when it was sent, and with `wait` that of the run. Raises UserError
        when the run is under way already or SLURM refuses the job.
        """
        path = Path(cfg.out_dir).absolute()
        if self.keys.dry_run:
            print(self.script(str(cfg.name), path / "logs" / "slurm", path / "code" / "SNAPSHOT"))
            return 0
        refuse_active(path)
        run_dir = RunDir(rundir.create(cfg, command, overrides).path.absolute())
        if run_dir.read_status().get("state") == "done":
            print(f"{cfg.out_dir}: done already; nothing was sent")
            return 0
        (job_id,) = self.send([run_dir.path], folder=run_dir.path, name=str(cfg.name))
        print(_sent(job_id, self.keys, cfg.out_dir), flush=True)
        if not self.keys.wait:
            return 0
        state = wait_for([run_dir.path])[0]
        print(f"{state.state}: {cfg.out_dir}")
        return {"done": 0, "stopped": _STOPPED, "preempted": _STOPPED}.get(state.state, 1)

    def send(self, paths: Sequence[Path], *, folder: Path, name: str) -> list[str]:
        """Send the runs in frozen folders as one job, or one array; return a job id for each.

        The code is copied to `folder`/code and what submitit keeps is in `folder`/logs/slurm.
        Raises UserError when there is no SLURM or it refuses; then nothing was sent.
        """
        if self.keys.cluster == "slurm" and (
            not shutil.which("sbatch") or not shutil.which("srun")
        ):
            raise UserError(
                "launch=slurm: there is no sbatch here. Run this where SLURM's commands are, or "
                "launch.cluster=local to rehearse, or launch.dry_run=true to see the script"
            )
        code = snapshot.take(folder / "code")
        logs = folder.absolute() / "logs" / "slurm"
        for path in paths:
            _record_sending(RunDir(path), code)
        logs.mkdir(parents=True, exist_ok=True)
        tasks = [Task(path.absolute()) for path in paths]
        if self.keys.cluster == "local":
            sent = self._start_here(tasks, logs, code.path)
        else:
            executor = submitit.SlurmExecutor(logs, max_num_timeout=self.keys.max_num_timeout)
            executor.update_parameters(**self.parameters(name, code.path))
            try:
                sent = executor.submit_array(tasks)
            except (FailedJobError, FailedSubmissionError) as error:
                reason = str(error).strip().replace("sbatch: error: ", "")
                raise UserError(f"launch=slurm: SLURM refuses the job: {reason}") from error
        here = jobs.LOCAL if self.keys.cluster == "local" else ""
        for path, job in zip(paths, sent, strict=True):
            RunDir(path).write_status(job_id=here + job.job_id, job_log=str(job.paths.stdout))
        return [here + job.job_id for job in sent]

    def script(self, name: str, logs: Path, code: Path, points: int | None = None) -> str:
        """Return the sbatch script of one run, or of an array of `points`."""
        command = (
            f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
        )
        return _make_sbatch_string(
            command=command, folder=logs, map_count=points, **self.parameters(name, code)
        )

    def parameters(self, name: str, code: Path) -> dict[str, Any]:
        """Return submitit's names and values for the job's sbatch script."""
        keys = self.keys
        further = {"requeue": True} | {
            str(key).replace("_", "-"): value for key, value in keys.additional_parameters.items()
        }
        if further["requeue"] in (False, None):
            further |= {"requeue": None, "no-requeue": True}
        values = {
            "job_name": name,
            "nodes": keys.nodes,
            "ntasks_per_node": tasks_per_node(keys),
            "gpus_per_node": keys.gpus_per_node or None,
            "cpus_per_task": keys.cpus_per_task,
            "mem": None if keys.mem_gb is None else f"{round(keys.mem_gb * 1024)}MB",
            "time": keys.timeout_min,
            "signal_delay_s": keys.signal_delay_s,
            "partition": keys.partition,
            "account": keys.account,
            "qos": keys.qos,
            "constraint": keys.constraint,
            "array_parallelism": keys.array_parallelism,
            "setup": self._setup(code),
            "stderr_to_stdout": True,
            # A rank that fails ends its job; and a step does not take this from its job by itself.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={keys.cpus_per_task}"],
            "additional_parameters": {k: v for k, v in further.items() if v is not None},
        }
        # Submitit's own wckey is refused where such keys are enforced.
        return {key: value for key, value in values.items() if value is not None} | {"wckey": None}

    def _setup(self, code: Path) -> list[str]:
        """Return the person's shell lines, then those that make the tasks run the snapshot."""
        return [
            *map(str, self.keys.setup),
            # Last, so that no `module load` comes before it on the path.
            f"export PYTHONPATH={shlex.quote(str(code))}:${{PYTHONPATH:+$PYTHONPATH:}}"
            f"{shlex.quote(os.getcwd())}",
            # Else the code in the current folder, maybe edited since, would come first.
            "export PYTHONSAFEPATH=1",
        ]

    def _start_here(self, tasks: list[Task], logs: Path, code: Path) -> list[Any]:
        """Start the tasks' jobs with submitit's local executor, which take turns."""
        turn = shlex.quote(str(logs / "turn"))
        executor = submitit.LocalExecutor(logs, max_num_timeout=self.keys.max_num_timeout)
        executor.update_parameters(
            tasks_per_node=tasks_per_node(self.keys),
            gpus_per_node=self.keys.gpus_per_node,
            timeout_min=self.keys.timeout_min,
            signal_delay_s=self.keys.signal_delay_s,
            stderr_to_stdout=True,
            setup=[
                f"{{ ! command -v flock >/dev/null || {{ exec 9>>{turn} && flock 9; }}; }}",
                *self._setup(code),
            ],
        )
        with _output_to(logs / "local.log"):
            return executor.submit_array(tasks)


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
            if code == _STOPPED:
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
            return _STOPPED
        if timeouts > launch.max_num_timeout:
            error = f"ran into its time limit {timeouts} times (launch.max_num_timeout)"
            run_dir.write_status(stop_cause="timeout", timeouts=timeouts, last_error=error)
            return _STOPPED
        # Before the requeue, for this process may not live long after it.
        run_dir.write_status(state="queued", stop_cause=None, timeouts=timeouts)
        refusal = job.requeue()
        if refusal is None:
            print(f"requeued: {cause} at step {run_dir.read_status().get('step')}", flush=True)
            return LOCAL_REQUEUE_RETURN_CODE if job.local else 0
        run_dir.write_status(state="stopped", stop_cause=cause, last_error=refusal)
        return _STOPPED


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
    submitit.helpers.TorchDistributedEnvironment().export(
        overwrite=True, set_cuda_visible_devices=False
    )
    # Below the ports that the kernel gives to clients, among which submitit's choice may fall, and
    # another after a requeue.
    attempt = f"{jobs.current_job_id()}:{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ["MASTER_PORT"] = str(_FIRST_PORT + zlib.crc32(attempt.encode()) % _PORTS)
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def refuse_active(path: Path) -> None:
    """Raise UserError while the run in `path` is queued or runs."""
    (state,) = jobs.states([path])
    if state.state in jobs.ACTIVE and state.job_id:
        raise UserError(
            f"{path}: is {state.state} already, as job {state.job_id}; `lunaris cancel {path}` "
            "ends that"
        )


def wait_for(paths: Sequence[Path]) -> list[jobs.RunState]:
    """Block until none of the runs is queued or running any more; return where they stand."""
    while True:
        states = jobs.states(paths)
        # A job that ends and is requeued is, for a moment, neither.
        if not any(state.state in (*jobs.ACTIVE, "missing") for state in states):
            time.sleep(_POLL_S)
            states = jobs.states(paths)
            if not any(state.state in jobs.ACTIVE for state in states):
                return states
        time.sleep(_POLL_S)


def _record_sending(run_dir: RunDir, code: snapshot.Snapshot) -> None:
    path = run_dir.path / "provenance.json"
    rundir.write_json(path, read_json(path) | {"code": code.provenance()})
    run_dir.write_status(
        state="queued", job_id=None, job_log=None, last_error=None, stop_cause=None, cancelled=None
    )


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


def _sent(job_id: str, keys: SlurmLaunchConfig, out_dir: str) -> str:
    where = f", partition {keys.partition}" if keys.partition else ""
    shape = f"{keys.nodes} nodes × {tasks_per_node(keys)} tasks"
    log = f"{out_dir}/logs/rank_0.log"
    return "\n".join(
        [
            f"sent    job {job_id} ({shape}{where})",
            f"run     {out_dir}",
            f"log     {log}",
            f"follow  tail -F {shlex.quote(log)}",
            f"state   lunaris runs {shlex.quote(out_dir)}",
        ]
    )


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


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what processes started within print to `log`, so that they hold no pipe of ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file, warnings.catch_warnings():
        # submitit's jobs outlive this process; Python warns of the running child.
        warnings.simplefilter("ignore", ResourceWarning)
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            for fd, old in zip((1, 2), kept, strict=True):
                os.dup2(old, fd)
                os.close(old)
