"""Where the time of recorded steps went: by group, by operator, waiting for other processes.

All times are seconds, and means over the recorded steps unless a name says otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from lunaris.profiling.regions import STEP, group_of_region

COMMUNICATION = "communication"
DATA = "waiting for data"
OUTSIDE = "outside operators"
IDLE = "device idle"
OTHER = "other operators"

Interval = tuple[float, float]


@dataclass
class Operator:
    """What one operator took of a step: its own time without that of operators it calls."""

    name: str
    self_s: float
    calls: float


@dataclass
class Account:
    """The recorded steps of one process.

    step_s, waiting_s, data_s: of each step, its time, the part of it in which the process did
    nothing but exchange with others, and that in which it waited for its data. groups: they sum to
    a step, but for operators of a GPU that run at the same time. on_device: whether groups and
    operators are times of the GPU, not of the thread that trains.
    """

    step_s: list[float] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    groups: dict[str, float] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    on_device: bool = False

    def mean_s(self) -> float:
        """Return the time of a step."""
        return sum(self.step_s) / len(self.step_s)

    def own_s(self) -> float:
        """Return the time of a step without the waiting for other processes.

        A step of all processes takes as long as the slowest one; this is what tells which it is.
        """
        return self.mean_s() - sum(self.waiting_s) / len(self.step_s)


def account_of(events: Iterable[Any], data_s: list[float]) -> Account:
    """Return the account of the steps in the events of a `torch.profiler.profile`.

    events: `FunctionEvent`s with the regions of `lunaris.profiling.regions`. data_s: of each step.
    """
    found = sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end))
    on_cpu = [e for e in found if e.device_type == DeviceType.CPU]
    marks = [e for e in on_cpu if group_of_region(e.name) == STEP]
    steps = [_interval(e) for e in marks]
    groups = _groups(e for e in on_cpu if not e.is_async)
    inside = [e for e in on_cpu if id(e) in groups and _in_a_step(e, steps)]
    # A region of the CPU stands among the GPU's events too.
    regions = {e.name for e in on_cpu if e.is_user_annotation}
    kernels = [
        e for e in found
        if e.device_type != DeviceType.CPU and not e.is_user_annotation and e.name not in regions
    ]  # fmt: skip
    if kernels:
        exchanged = [_interval(e) for e in kernels if "nccl" in e.name.lower()]
        computed = [_interval(e) for e in kernels if "nccl" not in e.name.lower()]
        spent = [(e, e.self_device_time_total) for e in inside]
    else:
        thread = marks[0].thread if marks else None
        inside = [e for e in inside if e.thread == thread and _is_operator(e)]
        exchanges = [e for e in inside if groups[id(e)] == COMMUNICATION]
        exchanges += [e for e in on_cpu if e.is_async and e.name.startswith("gloo:")]
        exchanged = [_interval(e) for e in exchanges]
        computed = [_interval(e) for e in inside if groups[id(e)] != COMMUNICATION]
        spent = [(e, e.self_cpu_time_total) for e in inside]
    waiting = [_length(_without(_cut(exchanged, step), computed)) for step in steps]
    account = Account(
        step_s=[(end - begin) / 1e6 for begin, end in steps],
        waiting_s=[us / 1e6 for us in waiting],
        data_s=data_s,
        operators=_operators(spent, len(steps)),
        on_device=bool(kernels),
    )
    totals: dict[str, float] = defaultdict(float)
    for event, us in spent:
        if groups[id(event)] != COMMUNICATION:
            totals[groups[id(event)]] += us / 1e6 / len(steps)
    busy = [_length(_cut(exchanged + computed, step)) / 1e6 for step in steps]
    account.groups = _completed(account, totals, busy)
    return account


def _completed(account: Account, totals: dict[str, float], busy_s: list[float]) -> dict[str, float]:
    """Return the groups, the longest first, and then the time that belongs to no operator.

    busy_s: of each step, the time in which operators ran.
    """
    n = len(account.step_s)
    found = {**totals, COMMUNICATION: sum(account.waiting_s) / n}
    found = {name: s for name, s in found.items() if s > 0}
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    if account.on_device:
        return found | {IDLE: account.mean_s() - sum(busy_s) / n}
    found[DATA] = sum(account.data_s) / n
    return found | {OUTSIDE: max(0.0, account.mean_s() - sum(found.values()))}


def _operators(spent: list[tuple[Any, float]], n_steps: int) -> list[Operator]:
    """Return the operators that took time, the longest first."""
    us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event, each in spent:
        us[event.name] += each
        calls[event.name] += 1
    rows = [Operator(name, us[name] / 1e6 / n_steps, calls[name] / n_steps) for name in us]
    return sorted((row for row in rows if row.self_s > 0), key=lambda row: -row.self_s)


def _is_operator(event: Any) -> bool:
    """Return whether an event of the CPU is code of torch, within which no Python runs.

    Regions are not, nor the nodes of autograd: hooks and the Python of custom functions run there.
    """
    nodes = ("autograd::", "torch::autograd::")
    return "::" in event.name and not (event.is_user_annotation or event.name.startswith(nodes))


def _groups(events: Iterable[Any]) -> dict[int, str]:
    """Return the group of each event by its `id`; events: of the CPU, in the order of their start.

    An event belongs to the region in which it runs. One of the backward belongs to the group of the
    operator that it differentiates, which has the same sequence number.
    """
    found: dict[int, str] = {}
    forward: dict[tuple[int, int], str] = {}
    for event in events:
        group = _own_group(event.name)
        numbered = event.sequence_nr >= 0
        if group is None and numbered and event.fwd_thread:
            group = forward.get((event.fwd_thread, event.sequence_nr))
        if group is None:
            parent = event.cpu_parent
            group = OTHER if parent is None else found.get(id(parent), OTHER)
        if numbered and not event.fwd_thread:
            # Of several with one number, the last is the one that has a backward.
            forward[event.thread, event.sequence_nr] = group
        found[id(event)] = group
    return found


def _own_group(name: str) -> str | None:
    """Return the group that an event's name alone decides, or None."""
    region = group_of_region(name)
    if region is not None:
        return OTHER if region == STEP else region
    if name.startswith("Optimizer."):
        return "optimizer"
    if "c10d" in name or name == "record_param_comms":
        return COMMUNICATION
    if name.startswith("FSDP::"):
        return "sharding"  # The copies before an all-gather and after it, and of gradients.
    return "vocabulary loss" if "_VocabularyLoss" in name else None


def _interval(event: Any) -> Interval:
    return event.time_range.start, event.time_range.end


def _in_a_step(event: Any, steps: list[Interval]) -> bool:
    """Return whether an event began within a step; steps: in the order of their start."""
    begin = event.time_range.start
    index = bisect_right(steps, (begin, float("inf"))) - 1
    return index >= 0 and begin < steps[index][1]


def _cut(intervals: list[Interval], to: Interval) -> list[Interval]:
    """Return the parts of intervals within another one."""
    cut = [(max(begin, to[0]), min(end, to[1])) for begin, end in intervals]
    return [(begin, end) for begin, end in cut if begin < end]


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals, in order, that cover the same."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _without(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """Return what of the intervals no other one covers."""
    found: list[Interval] = []
    taken = _union(others)
    for begin, end in _union(intervals):
        first = max(0, bisect_right(taken, (begin, float("inf"))) - 1)
        for other_begin, other_end in taken[first:]:
            if other_begin >= end:
                break
            if other_begin > begin:
                found.append((begin, other_begin))
            begin = max(begin, other_end)
        if begin < end:
            found.append((begin, end))
    return found


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in _union(intervals))
