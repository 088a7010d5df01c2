"""Runs sent to SLURM through submitit, or rehearsed on this machine."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import submitit

from lunaris.config.frozen import to_tree
from lunaris.config.schema.base import component_keys
from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.config.trust import targets_of
from lunaris.errors import Stopped, UserError
from lunaris.launch import snapshot
from lunaris.launch.awaited import awaited_jobs
from lunaris.launch.job_environment import (
    python_command,
    sbatch_options,
    setup_lines,
    srun_args,
    teardown_lines,
)
from lunaris.launch.local import output_to
from lunaris.launch.sending import record, send_all
from lunaris.launch.slurm_task import Task
from lunaris.launch.submitit_internals import (
    HOLD_SIGNALS,
    SIGNALLED,
    TRAP_SIGNALS,
    sbatch_script,
)
from lunaris.runs.create import create
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import LOCAL, refusal_of
from lunaris.runs.status import RunState, has_trained, refuse_active, resolve_states

_POLL_S = 2.0
_CORES_A_GPU = 8
_MEMORY = {"mem", "mem_per_cpu", "mem_per_gpu"}


class Slurm:
    """Sends runs as jobs in which every task is one rank; takes the keys of `launch=slurm`."""

    def __init__(self, **keys: Any) -> None:
        self.keys = SlurmLaunchConfig(**keys)
        if self.keys.cluster == "local" and self.keys.nodes > 1:
            raise UserError(
                f"launch.nodes={self.keys.nodes}: must be 1 with launch.cluster=local, which runs "
                "the job on this machine"
            )

    @classmethod
    def of(cls, cfg: Config) -> Slurm:
        """Return the launcher that the `launch` group of a config describes."""
        return cls(**component_keys(cfg.launch))

    def submit(self, cfg: Config, command: str, overrides: list[str]) -> int:
        """Freeze the run's folder, send the run and return; with `wait`, return when it has ended.

        Returns the exit code: 0 when the run was sent, and with `wait` that of the run. Raises
        UserError when the run is queued or running already or SLURM refuses the job.
        """
        path = Path(cfg.out_dir).absolute()
        check_folder(path)
        if self.keys.dry_run:
            print(self.script(str(cfg.name), path / "logs" / "slurm", path / "code" / "SNAPSHOT"))
            say_dry(cfg.out_dir)
            return 0
        refuse_active(path)
        self.check(str(cfg.name), path)
        run_dir = RunDir(create(cfg, command, overrides).path.absolute())
        if has_trained(run_dir.path, cfg):
            status = run_dir.read_status()
            how = "done" if status["state"] == "done" else f"at step {status['step']}"
            print(f"{cfg.out_dir}: already {how}; nothing was sent")
            return 0
        # Two commands that send one run at the same time: the second sees the job of the first.
        with run_dir.submission_lock():
            refuse_active(path)
            (job_id,) = self.send(
                [run_dir.path],
                folder=run_dir.path,
                name=str(cfg.name),
                targets=targets_of(to_tree(cfg)),
            )
        sent = run_dir.read_status().get("chain") or [job_id]
        print(_sent(sent, self.keys, cfg.out_dir), flush=True)
        if not self.keys.wait:
            return 0
        state = wait_until_ended([run_dir.path])[0].state
        print(f"{state}: {cfg.out_dir}")
        if state in ("stopped", "preempted"):
            return Stopped.exit_code
        return int(state not in FINISHED)

    def check_clients(self) -> None:
        """Raise UserError where the jobs are for SLURM and its commands are absent."""
        if self.keys.cluster == "slurm" and (
            not shutil.which("sbatch") or not shutil.which("srun")
        ):
            raise UserError(
                "launch=slurm: there is no sbatch here. Run the command where SLURM's commands are "
                "installed, or add launch.cluster=local to rehearse it here, or "
                "launch.dry_run=true to see the script"
            )

    def send(
        self, paths: Sequence[Path], *, folder: Path, name: str, targets: Iterable[str] = ()
    ) -> list[str]:
        """Send the runs in frozen folders as one job, or as arrays; return a job id for each.

        The code is copied to `folder`/code, with that of `targets` (dotted paths of classes that
        the configs name); submitit's files go to `folder`/logs/slurm. Raises
        UserError when SLURM is absent or refuses a job; the runs that it refuses, and those that
        would follow, are failed, with its reason.
        """
        check_folder(folder.absolute())
        self.check_clients()
        awaited = awaited_jobs(self.keys)
        code = snapshot.take(folder / "code", targets)
        logs = folder.absolute() / "logs" / "slurm"
        for path in paths:
            _mark_queued(RunDir(path), code, self.keys.awaited())
        logs.mkdir(parents=True, exist_ok=True)
        if self.keys.cluster == "local":
            tasks = [Task(path.absolute()) for path in paths]
            return record(paths, self._start_here(tasks, logs, code.path), LOCAL)

        def submit(tasks: list[Task], after: Sequence[str], parallelism: int) -> list[Any]:
            parameters = self.parameters(name, logs, code.path, after)
            return self._submit(tasks, logs, parameters | {"array_parallelism": parallelism})

        return send_all(paths, self.keys, submit, awaited)

    def _submit(
        self, tasks: Sequence[Callable[[], None]], logs: Path, parameters: dict[str, Any]
    ) -> list[Any]:
        executor = submitit.SlurmExecutor(
            logs,
            max_num_timeout=self.keys.max_num_timeout,
            python=python_command(self.keys, _folder_of(logs)),
        )
        executor.update_parameters(**parameters)
        # submitit prints what its error says.
        with redirect_stderr(io.StringIO()):
            return executor.submit_array(tasks)

    def check(self, name: str, folder: Path) -> None:
        """Raise UserError where SLURM would refuse jobs that `folder` is for; write nothing."""
        check_folder(folder.absolute())
        self.check_clients()
        if self.keys.cluster == "local":
            return
        refused = refusal_of(self.script(name, folder.absolute() / "logs" / "slurm", folder))
        if refused is not None:
            where = f"launch.partition={self.keys.partition}: " if self.keys.partition else ""
            raise UserError(f"{where}SLURM refuses the job, and nothing was sent: {refused}")

    def script(self, name: str, logs: Path, code: Path, points: int | None = None) -> str:
        """Return the sbatch script of one run, or of an array of `points`.

        Of a chain, it is that of its first job.
        """
        python = python_command(self.keys, _folder_of(logs))
        parameters = self.parameters(name, logs, code, awaited_jobs(self.keys))
        text = sbatch_script(logs, parameters, python, points)
        if self.keys.chain > 1:
            text += (
                f"\n# launch.chain={self.keys.chain}: sent {self.keys.chain} times, each with "
                "--dependency=afterany on the one before"
            )
        return text

    def parameters(
        self, name: str, logs: Path, code: Path, after: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return the options of the job's sbatch script under submitit's names.

        after: dependencies besides `launch.dependency`, as sbatch takes them.
        """
        keys = self.keys
        same = ("nodes", "cpus_per_task", "signal_delay_s", "partition", "account", "qos",
                "constraint", "array_parallelism")  # fmt: skip
        values = {key: getattr(keys, key) for key in same} | {
            "job_name": name,
            "ntasks_per_node": keys.processes_per_node(),
            "gpus_per_node": keys.gpus_per_node or None,
            "mem": None if keys.mem_gb is None else f"{round(keys.mem_gb * 1024)}MB",
            "time": keys.timeout_min,
            "setup": [
                TRAP_SIGNALS,
                HOLD_SIGNALS,
                *setup_lines(keys, logs, code),
                f"export {SIGNALLED}",
            ],
            "teardown": teardown_lines(keys),
            "stderr_to_stdout": True,
            "srun_args": srun_args(keys, _folder_of(logs)),
            "additional_parameters": sbatch_options(keys, after),
        }
        # submitit sets a wckey by default; clusters that enforce such keys refuse it.
        return {key: value for key, value in values.items() if value is not None} | {"wckey": None}

    def _start_here(
        self, tasks: Sequence[Callable[[], None]], logs: Path, code: Path, *, in_turn: bool = True
    ) -> list[Any]:
        """Start the jobs of the tasks with submitit's local executor.

        in_turn: they run one at a time.
        """
        turn = shlex.quote(str(logs / "turn"))
        wait = f"{{ ! command -v flock >/dev/null || {{ exec 9>>{turn} && flock 9; }}; }}"
        executor = submitit.LocalExecutor(logs, max_num_timeout=self.keys.max_num_timeout)
        executor.update_parameters(
            tasks_per_node=self.keys.processes_per_node(),
            gpus_per_node=self.keys.gpus_per_node,
            timeout_min=self.keys.timeout_min,
            signal_delay_s=self.keys.signal_delay_s,
            stderr_to_stdout=True,
            setup=[*([wait] if in_turn else []), *setup_lines(self.keys, logs, code)],
        )
        with (logs / "local.log").open("ab") as log, output_to(log), warnings.catch_warnings():
            # The jobs outlive this process; Python warns about the running child.
            warnings.simplefilter("ignore", ResourceWarning)
            return executor.submit_array(tasks)


def say_dry(folder: object) -> None:
    """Say on standard error, away from the scripts, that nothing was sent."""
    print(f"launch.dry_run: nothing was written to {folder} or sent", file=sys.stderr)


def _folder_of(logs: Path) -> Path:
    """Return the folder of the run or the sweep whose submitit files are in `logs`."""
    return logs.parent.parent


def check_folder(folder: Path, key: str = "out_dir") -> None:
    """Raise UserError for a folder whose name SLURM or submitit would take for a pattern.

    key: that gives the folder.
    """
    for character in "%\\":
        if character in str(folder):
            raise UserError(
                f"{key}={folder}: must not contain {character}, which SLURM replaces in the "
                f"names of a job's logs; choose another {key}"
            )


def wait_until_ended(paths: Sequence[Path]) -> list[RunState]:
    """Block until none of the runs is queued or running, or may be; return their states."""
    while True:
        states = resolve_states(paths)
        # Checked twice, because a job that is being requeued is neither for a moment.
        if all(state.ended and state.state != "missing" for state in states):
            time.sleep(_POLL_S)
            states = resolve_states(paths)
            if all(state.ended for state in states):
                return states
        time.sleep(_POLL_S)


def _mark_queued(run_dir: RunDir, code: snapshot.Snapshot, awaited: Sequence[str]) -> None:
    run_dir.note(code=code.provenance())
    # Relative, so that a folder of runs may be moved.
    after = [os.path.relpath(folder, run_dir.path) for folder in awaited]
    run_dir.write_status(
        state="queued", job_id=None, job_log=None, last_error=None, stop_cause=None, cancelled=None,
        after=after, failures=0, last_failure=None, chain=[],
        bad_nodes={}, excluded={}, preflights=0,
    )  # fmt: skip


def _sent(job_ids: Sequence[str], keys: SlurmLaunchConfig, out_dir: str) -> str:
    where = f", partition {keys.partition}" if keys.partition else ""
    tasks = keys.processes_per_node()
    shape = f"{keys.nodes} node{'s' * (keys.nodes != 1)} × {tasks} task{'s' * (tasks != 1)}"
    several = len(job_ids) > 1
    chain = f"s {', '.join(job_ids)}, one after the other" if several else f" {job_ids[0]}"
    log = f"{out_dir}/logs/rank_0.log"
    return "\n".join(
        [
            f"sent    job{chain} ({shape}{where})",
            f"run     {out_dir}",
            f"log     {log}",
            f"follow  tail -F {shlex.quote(log)}",
            f"state   lunaris runs {shlex.quote(out_dir)}",
            *_unasked(keys),
        ]
    )


def _unasked(keys: SlurmLaunchConfig) -> list[str]:
    """Return a line for each resource that a job with GPUs leaves to SLURM, as sites differ."""
    if not keys.gpus_per_node:
        return []
    given = {name.replace("-", "_") for name in keys.additional_parameters}
    lines = []
    if keys.cpus_per_task == 1:
        lines.append(
            f"note    one core a process: launch.cpus_per_task={_CORES_A_GPU} or more lets the "
            "data loader, NCCL and saving run next to the training"
        )
    if keys.mem_gb is None and not given & _MEMORY:
        lines.append(
            "note    no memory was asked for, so a node's is the partition's default: set "
            "launch.mem_gb, for all processes of a node, where that is small"
        )
    return lines
