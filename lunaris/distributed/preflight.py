"""Looks at every node of a run before its first step: is it right, as fast as the others, and free?

Each process multiplies two matrices whose product it can check, reads its memory and its clock, and
takes part in an all-reduce. The first process of each node then exchanges data with those of two
other nodes, one pair at a time for each node, because an all-reduce is as slow as its slowest link
and does not show which one that is. All processes gather what was measured and judge it alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from lunaris.distributed import collectives, session

# Rows and columns of the matrices: large enough to be bound by the arithmetic of the device.
_SIZE = {"cuda": 4096, "cpu": 512}
# The share of the first matrix that is not zero, so that sums are exact in bfloat16.
_DENSITY = 1 / 128
_MATMUL_S = 0.3
_MESSAGE_BYTES = 64 << 20
_LINK_BYTES = {"cuda": 64 << 20, "cpu": 8 << 20}
_REPEATS = 3
# Seconds between two clocks above which the logs of nodes cannot be compared.
_CLOCK_S = 1.0
# The share of the other nodes' free memory below which something else holds memory of a node.
_FREE_SHARE = 0.5
_GB = 1e9


@dataclass(frozen=True)
class Measurement:
    """What one process measured of its device and its node.

    error: what is wrong with its product, or "". tflops: 10^12 FLOP/s of it. device_gb, host_gb:
    free memory; device_gb is 0 for a CPU. clock_s: how far its clock is ahead of rank 0's.
    allreduce_gb_s, link_gb_s: bytes of a tensor per second; link_gb_s is that of the faster one of
    the node's two links, 0 where there are no others.
    """

    rank: int
    node: str
    error: str = ""
    tflops: float = 0.0
    device_gb: float = 0.0
    host_gb: float = 0.0
    clock_s: float = 0.0
    allreduce_gb_s: float = 0.0
    link_gb_s: float = 0.0


@dataclass(frozen=True)
class Fault:
    """What is wrong with a node, in words with the figure and that of the others."""

    node: str
    rank: int
    what: str

    def __str__(self) -> str:
        return f"{self.node} (rank {self.rank}): {self.what}"


def node_name() -> str:
    """Return the name of this machine, as SLURM knows it within a job."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def measure() -> list[Measurement]:
    """Measure every process and its node; return all measurements, by rank, in every process.

    Every process of an open session calls this. It takes some seconds.
    """
    mine = Measurement(session.rank(), node_name(), host_gb=_free_host_gb())
    device = session.device()
    if device.type == "cuda":
        mine = replace(mine, device_gb=torch.cuda.mem_get_info(device)[0] / _GB)
    try:
        error, tflops = check_product(device)
    except RuntimeError as failed:  # That of a broken device.
        error, tflops = f"the matrix product failed: {str(failed).splitlines()[0]}", 0.0
    mine = replace(mine, error=error, tflops=tflops, clock_s=_clock_offset_s())
    # A device that cannot multiply may not communicate either.
    if session.world_size() > 1 and not collectives.any_rank(bool(error)):
        allreduce = _allreduce_gb_s(device)
        mine = replace(mine, allreduce_gb_s=allreduce, link_gb_s=_link_gb_s(device))
    return collectives.gather_objects(mine)


def check_product(device: torch.device) -> tuple[str, float]:
    """Multiply two matrices; return what is wrong with the product, or "", and 10^12 FLOP/s.

    The entries are -1, 0 and 1 and so sparse that every sum is exact.
    """
    n = _SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(session.rank())
    a = torch.randint(0, 2, (n, n), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    b = torch.randint(0, 2, (n, n), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    a *= torch.rand(n, n, generator=generator) < _DENSITY
    left, right = a.to(device, dtype), b.to(device, dtype)
    seconds = _best_time(lambda: left @ right, device, _MATMUL_S)
    # Freivalds' check: (A·B)·x = A·(B·x), on the host, in a number format that is exact.
    x = torch.randint(-(1 << 20), 1 << 20, (n, 2), generator=generator).double()
    found = (left @ right).cpu().double() @ x
    wrong = int((found != a.double() @ (b.double() @ x)).any(dim=1).sum())
    error = f"{wrong} of {n} rows of a matrix product are wrong" if wrong else ""
    return error, 2 * n**3 / seconds / 1e12


def judge(found: list[Measurement], share: float) -> list[Fault]:
    """Return what is wrong with the nodes, the gravest first of each; [] where all are well.

    share: of the median over the nodes, below which a node's speed counts as slow. Of two nodes
    the median is the mean, and their link is the same one, so that only its speed is known.
    """
    faults = [Fault(m.node, m.rank, m.error) for m in found if m.error]
    faults += _behind(found, "tflops", "{:.3g} TFLOP/s", share, "a matrix product at")
    faults += _behind(found, "link_gb_s", "{:.3g} GB/s", share, "its links to other nodes carry")
    for name, kind in (("device_gb", "device"), ("host_gb", "host")):
        about = f"free memory of the {kind}:"
        faults += _behind(found, name, "{:.3g} GB", _FREE_SHARE, about)
    return faults + _wrong_clocks(found)


def summary(found: list[Measurement]) -> str:
    """Return a line about all nodes: the range of each figure."""
    nodes = len({m.node for m in found})
    parts = [f"{nodes} node{'s' * (nodes != 1)}", _range(found, "tflops", "TFLOP/s")]
    for name, unit, about in (
        ("allreduce_gb_s", "GB/s", f"all-reduce of {_MESSAGE_BYTES >> 20} MB "),
        ("link_gb_s", "GB/s", "links "),
        ("device_gb", "GB", "free on devices "),
        ("host_gb", "GB", "free on hosts "),
    ):
        if any(getattr(m, name) for m in found):
            parts.append(about + _range(found, name, unit))
    return f"preflight  {', '.join(parts)}"


def _wrong_clocks(found: list[Measurement]) -> list[Fault]:
    """Return the nodes whose clock is far from the median of the nodes; of two, from rank 0's."""
    first = {m.node: m for m in reversed(found)}
    offsets = [m.clock_s for m in first.values()]
    usual = statistics.median(offsets) if len(offsets) > 2 else 0.0
    faults = []
    for m in first.values():
        gap = m.clock_s - usual
        if abs(gap) > _CLOCK_S:
            side = "ahead of" if gap > 0 else "behind"
            what = f"its clock is {abs(gap):.1f} s {side} those of the others"
            faults.append(Fault(m.node, m.rank, what))
    return faults


def _range(found: list[Measurement], name: str, unit: str) -> str:
    known = [getattr(m, name) for m in found if getattr(m, name)]
    low, high = (f"{value:.3g}" for value in (min(known, default=0.0), max(known, default=0.0)))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _behind(
    found: list[Measurement], name: str, form: str, share: float, about: str
) -> list[Fault]:
    """Return the nodes whose slowest process is below a share of the median over the nodes.

    Processes that measured nothing (0) do not count.
    """
    known = [m for m in found if getattr(m, name) > 0 and not m.error]
    slowest: dict[str, Measurement] = {}
    for m in known:
        before = slowest.setdefault(m.node, m)
        if getattr(m, name) < getattr(before, name):
            slowest[m.node] = m
    values = [getattr(m, name) for m in slowest.values()]
    if len(values) < 2:
        return []
    median = statistics.median(values)
    return [
        Fault(
            m.node, m.rank,
            f"{about} {form.format(getattr(m, name))}, the median of the nodes is "
            f"{form.format(median)}",
        )
        for m in slowest.values()
        if getattr(m, name) < share * median
    ]  # fmt: skip


def _allreduce_gb_s(device: torch.device) -> float:
    """Return the bytes of a tensor that an all-reduce over all processes takes in a second."""
    tensor = torch.zeros(_MESSAGE_BYTES // 4, device=device)
    seconds = _best_time(lambda: dist.all_reduce(tensor), device, repeats=_REPEATS)
    return _MESSAGE_BYTES / seconds / _GB


def _link_gb_s(device: torch.device) -> float:
    """Return the speed of the faster one of this node's links to two others, 0 without any.

    Only the first process of each node exchanges; the others wait.
    """
    names = collectives.gather_objects(node_name())
    first = [rank for rank, name in enumerate(names) if name not in names[:rank]]
    fastest = 0.0
    for pairs in _rounds(first):
        collectives.barrier()
        for pair in pairs:
            if session.rank() in pair:
                other = pair[pair.index(session.rank()) ^ 1]
                fastest = max(fastest, _exchange_gb_s(device, other))
    collectives.barrier()
    return fastest


def _rounds(ranks: list[int]) -> list[list[tuple[int, int]]]:
    """Return the pairs of neighbours on a ring, in rounds in which each rank is in one at most."""
    n = len(ranks)
    if n < 2:
        return []
    pairs = [(ranks[i], ranks[(i + 1) % n]) for i in range(n if n > 2 else 1)]
    even = [pair for i, pair in enumerate(pairs) if i % 2 == 0 and not (n % 2 and i == n - 1)]
    odd = [pair for i, pair in enumerate(pairs) if i % 2 == 1]
    last = [pairs[-1]] if n % 2 and n > 2 else []
    return [round_ for round_ in (even, odd, last) if round_]


def _exchange_gb_s(device: torch.device, other: int) -> float:
    """Return the bytes that go to another process and come from it in a second, each way."""
    size = _LINK_BYTES[device.type]
    out, into = torch.zeros(2, size // 4, device=device)

    def exchange() -> None:
        moves = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
        for work in dist.batch_isend_irecv(moves):
            work.wait()

    seconds = _best_time(exchange, device, repeats=_REPEATS)
    return size / seconds / _GB


def _clock_offset_s() -> float:
    """Return how far the clock of this process is ahead of that of rank 0: the median of tries."""
    offsets = []
    for _ in range(_REPEATS):
        collectives.barrier()
        times = collectives.gather_objects(time.time())
        offsets.append(times[session.rank()] - times[0])
    return statistics.median(offsets)


def _free_host_gb() -> float:
    """Return the memory that processes can still get of this machine, 0 where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 / _GB if found else 0.0


def _best_time(
    call: Callable[[], object], device: torch.device, at_least_s: float = 0.0, repeats: int = 1
) -> float:
    """Call once to warm up, then for some seconds or so many times; return the shortest time."""
    call()
    _wait_for(device)
    best, began, calls = float("inf"), time.perf_counter(), 0
    while calls < repeats or time.perf_counter() - began < at_least_s:
        start = time.perf_counter()
        call()
        _wait_for(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
