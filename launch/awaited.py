"""The jobs of other runs for which a job waits (`launch.after`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.data import manifest as manifests
from lunaris.errors import UserError
from lunaris.runs.discovery import FoundRun, expected_runs, is_run, is_sweep
from lunaris.runs.preparation import is_preparation
from lunaris.runs.slurm_client import LOCAL
from lunaris.runs.status import RunState, refuse_unknown, resolve_states


def awaited_jobs(keys: SlurmLaunchConfig) -> list[str]:
    """Return the dependency of a job on what `launch.after` names, as sbatch takes it, or [].

    A run that is done needs no wait. Raises UserError for one that is not done and has no job that
    waits or runs, and where SLURM does not say.
    """
    folders = [(folder, run) for folder in keys.awaited() for run in _runs_in(folder)]
    paths = [run.path for _, run in folders]
    states = resolve_states(paths)
    refuse_unknown(paths, states)
    ids = [
        _job_of(folder, run, state)
        for (folder, run), state in zip(folders, states, strict=True)
        if state.state != "done"
    ]
    return [f"afterok:{':'.join(dict.fromkeys(ids))}"] if ids else []


def _runs_in(folder: str) -> Sequence[FoundRun]:
    path = Path(folder)
    prepares = is_preparation(path)
    if not is_run(path) and not is_sweep(path) and not prepares:
        if manifests.read(path) is not None:
            return []  # Shards that were prepared without a job.
        raise UserError(
            f"launch.after={folder}: {path.absolute()} is not a run's folder, not a sweep's, and "
            "none that jobs prepare; send that run first, or give launch.after=null"
        )
    return expected_runs(path, preparations=prepares)


def _job_of(folder: str, run: FoundRun, state: RunState) -> str:
    """Return the id of the job that waits or runs for a run. Raises UserError without one."""
    said = f"launch.after={folder}: {run.path} is {state.state}"
    if not state.active:
        why = f" ({state.remark})" if state.remark else ""
        first = "send it again" if run.prepares else "resume it"
        if state.state == "paused":
            first = "continue it by `lunaris resume` with trainer.stop_at=null"
        raise UserError(f"{said}{why}; {first} first, or give launch.after=null")
    if state.job_id is None or state.job_id.startswith(LOCAL):
        raise UserError(f"{said} on a machine, not as a job of SLURM, which cannot wait for it")
    return state.job_ids[-1]
