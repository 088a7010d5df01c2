"""The processes of a run: who they are, the group they form, what they tell each other.

One process needs no group: every function below then answers at once. With several, the default
group does the training's collectives (NCCL for CUDA tensors, gloo for CPU ones) and a second,
CPU-only group everything else, so that bookkeeping never waits for a device or a stream.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lunaris.distributed.heartbeat import Heartbeat, record_failure
from lunaris.errors import Stopped, UserError

T = TypeVar("T")

# The first step compiles, warms up and reads cold files, on some ranks later than on others.
_FIRST_STEP = timedelta(minutes=30)
# Checkpoint files differ in size; a rank that is gone is found by its missing heartbeat instead.
_BOOKKEEPING = timedelta(hours=1)
_READERS_S = 10.0


class _Session:
    """What `session` opened; one at a time."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.device = device
        self.timeout_s = timeout_s
        self.cpu_group: dist.ProcessGroup | None = None
        self.background_group: dist.ProcessGroup | None = None
        self.heartbeat: Heartbeat | None = None
        self.prompt = False
        self.calls = 0


_session: _Session | None = None


def rank() -> int:
    """Return this process's number among all of the run's (0 when alone)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def choose_device(name: str | None) -> torch.device:
    """Return this process's device: `name` (cpu or cuda), or CUDA where there is one.

    Raises UserError when CUDA is asked for and absent, or has fewer devices than processes.
    """
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("trainer.device=cuda: torch sees no CUDA device here; allowed is cpu")
    count = torch.cuda.device_count()
    # A SLURM task may see its own device alone.
    index = 0 if count == 1 and local_world_size() > 1 and _one_device_each() else local_rank()
    if index >= count:
        raise UserError(
            f"launch: {local_world_size()} processes on this machine, but it has {count} CUDA "
            "devices; start at most one process a device, or set trainer.device=cpu"
        )
    return torch.device("cuda", index)


def _one_device_each() -> bool:
    return "SLURM_PROCID" in os.environ


@contextmanager
def session(device: str | None, collective_timeout_s: float) -> Iterator[torch.device]:
    """Join the run's process group for as long as the context lasts; yield the device.

    Rank, world size and master address come from the environment, as torchrun, SLURM tasks and
    `lunaris.launch.local` set them. A collective that does not complete ends the process: within
    half an hour before the first step is done, then within `collective_timeout_s`. A process that
    stops giving signs of life is named by the others within the same time.
    """
    global _session
    assert _session is None, "a session is open already"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _session = _Session(chosen, collective_timeout_s)
    try:
        if world_size() > 1:
            _join(_session)
        yield chosen
    except Exception as error:
        suspect = _suspect(_session, error)
        if suspect is not None:
            record_failure(suspect)
            raise RuntimeError(suspect) from error
        # Before the group is left, for that makes the other processes fail too.
        record_failure(str(error) if _expected(error) else f"{type(error).__name__}: {error}")
        raise
    finally:
        opened, _session = _session, None
        if opened.heartbeat is not None:
            opened.heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(opened: _Session) -> None:
    cuda = opened.device.type == "cuda"
    timeout = max(_FIRST_STEP, timedelta(seconds=opened.timeout_s))
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        # The elastic agent keeps its store over restarts, with the dead processes' addresses.
        store=dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store),
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
        device_id=opened.device if cuda else None,
    )
    opened.cpu_group = dist.new_group(backend="gloo", timeout=_BOOKKEEPING)
    opened.background_group = dist.new_group(backend="gloo", timeout=_BOOKKEEPING)
    opened.heartbeat = Heartbeat(rank(), world_size(), opened.timeout_s)
    opened.heartbeat.start()


def ensure_group() -> None:
    """Make a process group of one for what needs a device mesh in a run of one process."""
    if not dist.is_initialized():
        assert world_size() == 1
        cuda = device().type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            device_id=device() if cuda else None,
        )


def device() -> torch.device:
    """Return this process's device; chosen anew (CUDA where there is one) outside a session."""
    return choose_device(None) if _session is None else _session.device


def cpu_group() -> dist.ProcessGroup | None:
    """Return the group for bookkeeping between processes; None for a process alone."""
    return None if _session is None else _session.cpu_group


def background_group() -> dist.ProcessGroup | None:
    """Return the group for a thread that saves while the main thread trains; None when alone.

    In a group of its own, its collectives cannot be taken for the main thread's.
    """
    return None if _session is None else _session.background_group


def mark(doing: str) -> None:
    """Note what this process begins to do, for the others to tell who lags if it hangs."""
    if _session is not None and _session.heartbeat is not None:
        _session.heartbeat.mark(doing)


def end_first_step() -> None:
    """Shorten the time a collective may take, now that every process has warmed up."""
    if _session is None or _session.prompt or not dist.is_initialized():
        return
    _session.prompt = True
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in (_session.cpu_group, _session.background_group):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=_session.timeout_s), group)


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier(group=cpu_group())


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true in any process; every process calls this."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=cpu_group())
    return bool(value.item())


def gather_objects(value: T) -> list[T]:
    """Return every process's (picklable) value, in the order of ranks, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=cpu_group())
    return values


def from_rank_0(value: T) -> T:
    """Return rank 0's (picklable) value in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=cpu_group())
    return box[0]


def on_rank_0(action: Callable[[], T]) -> T | None:
    """Run `action` in rank 0 while the others wait; return its result there, None elsewhere.

    What it raises is raised in every process. The wait has no limit of its own (preparing data
    may take hours): a rank 0 that died or stopped is found by its heartbeat.
    """
    if world_size() == 1:
        return action()
    assert _session is not None
    _session.calls += 1
    key = f"lunaris/on_rank_0/{_session.calls}"
    store = dist.distributed_c10d._get_default_store()
    if rank() == 0:
        try:
            result = action()
        except Exception as error:
            store.set(key, pickle.dumps(_picklable(error)))  # type: ignore[arg-type]
            _wait_for_readers(store, key)
            raise
        store.set(key, pickle.dumps(None))  # type: ignore[arg-type]
        return result
    while not store.check([key]):
        time.sleep(0.05)
    raised = pickle.loads(store.get(key))
    store.add(f"{key}/read", 1)
    if raised is not None:
        raise raised
    return None


def _wait_for_readers(store: dist.Store, key: str) -> None:
    """Wait a while until all others have read `key`: the store may end with this process."""
    until = time.monotonic() + _READERS_S
    while store.add(f"{key}/read", 0) < world_size() - 1 and time.monotonic() < until:
        time.sleep(0.05)


def _picklable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an exception's own class raises
        return RuntimeError(f"{type(error).__name__} in rank 0: {error}")


def _expected(error: Exception) -> bool:
    return isinstance(error, UserError | Stopped)


def _suspect(opened: _Session, error: Exception) -> str | None:
    """Return who seems to hang, when `error` is a collective's timeout."""
    if opened.heartbeat is None or "timed out" not in str(error).lower():
        return None
    return f"a collective timed out; {opened.heartbeat.laggards()}"
