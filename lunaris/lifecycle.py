"""What brackets a run: its folder's lock, its state in status.json, and errors in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.console import say
from lunaris.distributed import collectives, preflight, session
from lunaris.errors import RunFailed, Stopped, UserError
from lunaris.runs.checkpoint_files import full_disk
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import current_job_id


@contextmanager
def supervise(cfg: Config, run_dir: RunDir) -> Iterator[None]:
    """Lock a run's folder, keep its state in status.json and say plainly when its disk is full.

    Before anything else, the nodes are looked at if `launch.preflight` asks for it.
    """
    with run_lock(run_dir), track_status(cfg, run_dir), explain_full_disk(run_dir):
        check_nodes(cfg, run_dir)
        yield


@contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Lock the folder on rank 0. Every process raises UserError when another job has the lock."""
    with ExitStack() as stack:
        collectives.on_rank_0(lambda: stack.enter_context(run_dir.lock()))
        if session.rank() == 0:
            run_dir.set_aside_damaged()
        yield


@contextmanager
def track_status(cfg: Config, run_dir: RunDir) -> Iterator[None]:
    """Write the state to status.json on rank 0: running, then done, paused, stopped or failed."""
    if session.rank() != 0:
        yield
        return
    before = run_dir.read_status()
    attempts, job_id = run_dir.record_attempt(session.world_size()), current_job_id()
    run_dir.write_status(state="running", attempts=attempts, last_error=None, job_id=job_id)
    try:
        with _attempt(run_dir):
            yield
    except Stopped:
        run_dir.write_status(state="stopped")
        raise
    except BaseException as error:
        # A run that was done stays done when it cannot start again, because its data moved say.
        began = run_dir.read_status().get("step") != before.get("step")
        kept = before.get("state") in FINISHED and isinstance(error, UserError) and not began
        state = before["state"] if kept else "failed"
        # The error that counts is the first one, also where a full disk takes no status.
        with suppress(OSError):
            run_dir.write_status(state=state, last_error=f"{type(error).__name__}: {error}")
        raise
    trainer, step = cfg.trainer, run_dir.read_status().get("step", 0)
    paused = max(step, trainer.end()) < trainer.max_steps
    run_dir.write_status(state="paused" if paused else "done", last_error=None)


@contextmanager
def _attempt(run_dir: RunDir) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError, KeyError):  # What ends the attempt counts, also on a full disk.
            run_dir.end_attempt()


def check_nodes(cfg: Config, run_dir: RunDir) -> None:
    """Look at the nodes of the run if `launch.preflight` asks for it; every process calls this.

    Raises RunFailed that names the slow and the wrong ones, which status.json then holds for the
    launcher to leave out.
    """
    launch = cfg.launch
    if not isinstance(launch, SlurmLaunchConfig) or not launch.preflight:
        return
    found = preflight.measure()
    faults = preflight.judge(found, launch.preflight_share)
    if session.rank() == 0:
        say(preflight.summary(found))
    if faults:
        # The first fault of a node counts.
        bad = {fault.node: fault.what for fault in reversed(faults)}
        collectives.on_rank_0(lambda: run_dir.write_status(bad_nodes=bad))
        raise RunFailed(f"preflight: {'; '.join(map(str, faults))}")


@contextmanager
def explain_full_disk(run_dir: RunDir) -> Iterator[None]:
    """Raise RunFailed with advice where the disk of the run's folder is full."""
    try:
        yield
    except OSError as error:
        if not full_disk(error):
            raise
        raise RunFailed(
            f"{run_dir.path}: {error.strerror}; the last checkpoint is kept. Make room, then start "
            "the run again"
        ) from error


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raise UserError with advice where the memory of the device or the host is too small."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"out of memory {advice} ({reason})") from error


def weights_advice(cfg: Config) -> str:
    """Return the keys that made a model as large as it is, after "out of memory"."""
    sizes = {
        "model.d_model": cfg.model.d_model,
        "model.n_layers": cfg.model.n_layers,
        "model.vocab_size": cfg.model.vocab_size,
        "moe.n_experts": getattr(cfg.moe, "n_experts", None),
    }
    shown = ", ".join(f"{name}={value}" for name, value in sizes.items() if value is not None)
    return (
        f"for the weights with {shown}; `lunaris plan` shows what each part takes. Smaller values, "
        "or parallelism=fsdp over more processes, take less"
    )


def step_advice(cfg: Config) -> str:
    """Return what takes less memory in a step, after "out of memory"."""
    return (
        f"with trainer.batch_size={cfg.trainer.batch_size} and "
        f"model.max_seq_len={cfg.model.max_seq_len}; lower the first and raise "
        "trainer.gradient_accumulation_steps as much, or set trainer.activation_checkpointing=full"
    )
