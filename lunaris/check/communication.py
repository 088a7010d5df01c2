"""Collectives and meshes of the processes of a check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from lunaris.check.item import FAIL, OK, Item, skipped
from lunaris.distributed import collectives, session
from lunaris.distributed.mesh import Mesh

_SIZES = (1 << 20, 64 << 20)
_REPEATS = 5
_AGREEMENTS = 50
_ALONE = "one process has nobody to exchange with; give launch.processes=N"


def communication_looks() -> dict[str, Callable[[], Item]]:
    """Return, by the name of its item, what every process calls to look at the network."""
    if session.world_size() == 1:
        names = ("all-reduce", "agreement", "meshes")
        return {name: partial(skipped, name, _ALONE) for name in names}
    return {"all-reduce": _all_reduce, "agreement": _agreement, "meshes": _meshes}


def _all_reduce() -> Item:
    """Time all-reduces, and check their sums."""
    figures: dict[str, float] = {}
    parts, wrong = [], 0
    world = session.world_size()
    for size in _SIZES:
        tensor = torch.full((size // 4,), float(session.rank()), device=session.device())
        dist.all_reduce(tensor)
        wrong += int((tensor != world * (world - 1) / 2).sum())
        seconds = min(_seconds_of(tensor) for _ in range(_REPEATS))
        name = f"{size >> 20} MB"
        figures[f"{size >> 20}mb_s"] = seconds
        parts.append(f"{name} in {_shown(seconds)} ({size / seconds / 1e9:.3g} GB/s)")
    text = ", ".join(parts) + f", {world} processes"
    if collectives.any_rank(bool(wrong)):
        return Item("all-reduce", FAIL, f"the sums are wrong; {text}", figures)
    return Item("all-reduce", OK, text, figures)


def _seconds_of(tensor: torch.Tensor) -> float:
    collectives.barrier()
    began = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - began


def _agreement() -> Item:
    """Time how the hosts agree, as they do before each batch of an evaluation."""
    collectives.barrier()
    began = time.perf_counter()
    told = [collectives.any_rank(session.rank() == i % 2) for i in range(_AGREEMENTS)]
    seconds = (time.perf_counter() - began) / _AGREEMENTS
    text = f"{_shown(seconds)}, once a batch of an evaluation"
    state = OK if all(told) and not collectives.any_rank(False) else FAIL
    return Item("agreement", state, text, {"seconds": seconds})


def _meshes() -> Item:
    """Build the mesh of each parallelism that fits, and sum over each of its dimensions."""
    kind, made, faults = session.device().type, [], []
    for name, mesh, names in _fitting(session.world_size()):
        built = mesh.device_mesh(kind, *names)
        for dimension in names:
            ones = torch.ones((), device=session.device())
            dist.all_reduce(ones, group=built.get_group(dimension))
            if collectives.any_rank(ones.item() != getattr(mesh, dimension)):
                faults.append(f"{name}: {dimension} sums over {ones.item():.0f} processes")
        made.append(name)
    if faults:
        return Item("meshes", FAIL, "; ".join(faults), {"meshes": made})
    return Item("meshes", OK, ", ".join(made), {"meshes": made})


def _fitting(world: int) -> Iterator[tuple[str, Mesh, tuple[str, ...]]]:
    """Yield the parallelisms that divide `world` processes: their name, mesh and dimensions."""
    degrees = [degree for degree in range(1, world + 1) if world % degree == 0]
    for degree in degrees:
        expert = f" expert_parallel={degree}" if degree > 1 else ""
        yield f"ddp{expert}", Mesh.replicated(world, degree), ("replicate", "expert")
        yield f"fsdp{expert}", Mesh.sharded(world, degree), ("shard", "expert")
        if 1 < degree < world:
            mesh = Mesh.sharded(world, 1, degree)
            yield f"hsdp shard_size={degree}", mesh, ("replicate", "shard")


def _shown(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms"
