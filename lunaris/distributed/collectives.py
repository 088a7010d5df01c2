"""What the processes of a run exchange besides tensors: flags, Python objects, waiting.

Every process must call these functions, in the same order. A process alone gets its own value
back at once. They use the CPU group of the session, and so never wait for a device.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from lunaris.distributed.session import cpu_group, current, rank, world_size
from lunaris.torch_internals import default_store

T = TypeVar("T")

_READERS_S = 10.0
# Of rank 0, by all processes that wait for it.
_MOST_QUESTIONS_PER_S = 2000


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier(group=cpu_group())


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true in any process."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=cpu_group())
    return bool(value.item())


def gather_objects(value: T) -> list[T]:
    """Return every process's (picklable) value, in the order of ranks, in every process."""
    values = [value] * world_size()
    if len(values) > 1:
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

    An exception of `action` is raised in every process. The wait has no time limit (preparing data
    may take hours): when rank 0 hangs or dies, the heartbeat reports it.
    """
    if world_size() == 1:
        return action()
    session = current()
    assert session is not None
    key = f"lunaris/on_rank_0/{next(session.calls)}"
    store = default_store()
    if rank() == 0:
        try:
            result = action()
        except Exception as error:
            store.set(key, pickle.dumps(_picklable(error)))  # type: ignore[arg-type]
            # Rank 0 may serve the store, so the others must have read the error before it ends.
            until = time.monotonic() + _READERS_S
            while store.add(f"{key}/read", 0) < world_size() - 1 and time.monotonic() < until:
                time.sleep(0.05)
            raise
        store.set(key, pickle.dumps(None))  # type: ignore[arg-type]
        return result
    pause, longest = 0.01, max(0.05, world_size() / _MOST_QUESTIONS_PER_S)
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, longest)
    raised = pickle.loads(store.get(key))
    store.add(f"{key}/read", 1)
    if raised is not None:
        raise raised
    return None


def _picklable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickling runs the code of the exception's class
        return RuntimeError(f"{type(error).__name__} in rank 0: {error}")
