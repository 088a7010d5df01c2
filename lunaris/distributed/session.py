"""The session of a process: its rank, its device, and the process groups that it has joined.

A process alone needs no group. Several form the default group, which does the training's
collectives (NCCL for CUDA tensors, gloo for CPU ones), and two CPU groups for everything else, so
that bookkeeping never waits for a device or a stream.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from lunaris.distributed.heartbeat import Heartbeat, record_failure
from lunaris.errors import UserError
from lunaris.torch_internals import set_collective_timeout

# Processes compile, warm up and read cold files in the first step and in the first evaluation, some
# much longer than others.
_FIRST_TIME = timedelta(minutes=30)
# Checkpoint files differ in size; a process that died is found by its missing heartbeat instead.
_BOOKKEEPING = timedelta(hours=1)


@dataclass
class Session:
    """The device, groups and heartbeat of this process; `join` opens one at a time."""

    device: torch.device
    timeout_s: float
    cpu_group: dist.ProcessGroup | None = None
    background_group: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None
    first_step_done: bool = False
    evaluated: bool = False
    calls: itertools.count[int] = field(default_factory=itertools.count)


_session: Session | None = None


def rank() -> int:
    """Return the number of this process among all of the run (0 for a process alone)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def choose_device(name: str | None) -> torch.device:
    """Return this process's device: `name` (cpu or cuda), or CUDA where there is one.

    Raises UserError when CUDA is requested and absent, or has fewer devices than processes.
    """
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("trainer.device=cuda: torch sees no CUDA device here; allowed is cpu")
    count = torch.cuda.device_count()
    # SLURM may show each task only the device that it assigned to the task.
    one_device_each = count == 1 and local_world_size() > 1 and "SLURM_PROCID" in os.environ
    index = 0 if one_device_each else local_rank()
    if index >= count:
        raise UserError(
            f"launch: {local_world_size()} processes on this machine, but it has {count} CUDA "
            "devices; start at most one process a device, or set trainer.device=cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def join(device: str | None, collective_timeout_s: float) -> Iterator[torch.device]:
    """Join the run's process groups for the duration of the context; yield the device.

    Rank, world size and master address come from the environment, as torchrun, SLURM tasks and
    `lunaris.launch.local` set them. A collective that does not complete ends the process: within
    half an hour before the first step is done and during the first evaluation, otherwise within
    `collective_timeout_s`. A process whose heartbeat stops is named by the others within the same
    time. Raises what `choose_device` raises, and RuntimeError that names the slowest ranks when a
    collective times out.
    """
    global _session
    assert _session is None, "a session is open already"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _session = Session(chosen, collective_timeout_s)
    try:
        if world_size() > 1:
            _init_groups(_session)
        yield chosen
    except Exception as error:
        if _session.heartbeat is not None and "timed out" in str(error).lower():
            suspect = f"a collective timed out; {_session.heartbeat.slowest_ranks()}"
            record_failure(suspect)
            raise RuntimeError(suspect) from error
        # Recorded before this process leaves its groups, which makes the others fail too.
        record_failure(error)
        raise
    finally:
        opened, _session = _session, None
        if opened.heartbeat is not None:
            opened.heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _init_groups(session: Session) -> None:
    timeout = _first_time(session)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    # The elastic agent keeps its store over restarts, with the dead processes' addresses.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    _init_default_group(session.device, store, timeout)
    session.cpu_group = dist.new_group(backend="gloo", timeout=_BOOKKEEPING)
    session.background_group = dist.new_group(backend="gloo", timeout=_BOOKKEEPING)
    session.heartbeat = Heartbeat(rank(), world_size(), session.timeout_s)
    session.heartbeat.start()


def ensure_group() -> None:
    """Make a process group of one, which device meshes need in a run of one process."""
    if not dist.is_initialized():
        assert world_size() == 1
        _init_default_group(device(), dist.HashStore(), None)


def _init_default_group(device: torch.device, store: dist.Store, timeout: timedelta | None) -> None:
    cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
        device_id=device if cuda else None,
    )


def current() -> Session | None:
    """Return the open session, or None."""
    return _session


def device() -> torch.device:
    """Return the session's device; outside a session CUDA where there is one, else the CPU."""
    return choose_device(None) if _session is None else _session.device


def cpu_group() -> dist.ProcessGroup | None:
    """Return the CPU group for bookkeeping between processes; None for a process alone."""
    return None if _session is None else _session.cpu_group


def background_group() -> dist.ProcessGroup | None:
    """Return the CPU group for a thread that saves while the main thread trains; None when alone.

    It is separate from `cpu_group`, so that the collectives of the two threads cannot be mixed up.
    """
    return None if _session is None else _session.background_group


def set_phase(phase: str) -> None:
    """Record what this process begins to do, which is reported if the process hangs in it."""
    if _session is not None and _session.heartbeat is not None:
        _session.heartbeat.set_phase(phase)


def excused() -> AbstractContextManager[None]:
    """Return the context of a call of torch in which Python, and so the heartbeat, cannot run."""
    beat = None if _session is None else _session.heartbeat
    return nullcontext() if beat is None else beat.excused()


def end_first_step() -> None:
    """Lower the time limit of collectives, once every process has done its first step."""
    if _session is None or _session.first_step_done or not dist.is_initialized():
        return
    _session.first_step_done = True
    _limit(_session, timedelta(seconds=_session.timeout_s))


@contextmanager
def evaluation() -> Iterator[None]:
    """Bracket an evaluation: in the first one, collectives may take as long as in the first step.

    A run that resumes has done its first step by then, but compiles what only evaluations run.
    """
    session = _session
    if session is None or session.evaluated or not session.first_step_done:
        yield
    else:
        _limit(session, _first_time(session))
        try:
            yield
        finally:
            _limit(session, timedelta(seconds=session.timeout_s))
    if session is not None:
        session.evaluated = True


def _first_time(session: Session) -> timedelta:
    return max(_FIRST_TIME, timedelta(seconds=session.timeout_s))


def _limit(session: Session, timeout: timedelta) -> None:
    """Set the time limit of the training's collectives."""
    set_collective_timeout(timeout, exempt=(session.cpu_group, session.background_group))
