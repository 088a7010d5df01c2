"""Accounts of events that are made by hand, also those of a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from lunaris.profiling.account import Account, account_of
from lunaris.profiling.report import as_text, slowest_text


def event(name: str, start: float, end: float, parent: Any = None, **keys: Any) -> Any:
    """Return what account_of reads of a FunctionEvent; times in µs, on the CPU."""
    return SimpleNamespace(**{
        "name": name, "time_range": SimpleNamespace(start=start, end=end), "cpu_parent": parent,
        "thread": 1, "fwd_thread": 0, "sequence_nr": -1, "is_async": False,
        "is_user_annotation": name.startswith("lunaris/"), "device_type": DeviceType.CPU,
        "self_cpu_time_total": end - start, "self_device_time_total": 0,
    } | keys)  # fmt: skip


def forward_and_backward(**keys: Any) -> list[Any]:
    step = event("lunaris/step/7", 0, 1000)
    region = event("lunaris/attention/0", 100, 300, step)
    node = event("MmBackward0", 400, 600, step, fwd_thread=1, sequence_nr=5)
    return [
        step,
        region,
        event("aten::mm", 100, 200, region, sequence_nr=5, **keys),
        node,
        event("aten::mm", 400, 600, node, **keys),
        # Another thread, and after the step.
        event("aten::copy_", 100, 900, thread=2),
        event("aten::mm", 1100, 1900),
    ]


def test_the_backward_counts_for_its_layer_and_an_exchange_only_where_nothing_else_runs() -> None:
    events = forward_and_backward()
    events.append(event("gloo:all_reduce", 500, 900, is_async=True, thread=3))
    account = account_of(events, [50e-6])
    assert account.step_s == [1000e-6] and account.waiting_s == pytest.approx([300e-6])
    assert account.own_s() == pytest.approx(700e-6) and not account.on_device
    assert account.groups == pytest.approx({
        "attention": 300e-6, "communication": 300e-6, "waiting for data": 50e-6,
        "outside operators": 350e-6,
    })  # fmt: skip
    (row,) = account.operators
    assert (row.name, row.calls) == ("aten::mm", 2) and row.self_s == pytest.approx(300e-6)


def test_on_a_gpu_the_times_are_those_of_its_kernels() -> None:
    gpu = {"device_type": DeviceType.CUDA, "thread": 7}
    events = forward_and_backward(self_device_time_total=150)
    reduced = event("c10d::allreduce_", 610, 620, events[0], self_device_time_total=400)
    events += [
        reduced,
        event("sgemm", 200, 350, **gpu),
        event("sgemm", 450, 600, **gpu),
        event("ncclDevKernel_AllReduce", 500, 900, **gpu),
        event("lunaris/attention/0", 200, 900, **gpu | {"is_user_annotation": False}),
    ]
    account = account_of(events, [0.0])
    assert account.on_device and account.waiting_s == pytest.approx([300e-6])
    assert account.groups == pytest.approx(
        {"attention": 300e-6, "communication": 300e-6, "device idle": 400e-6}
    )
    assert {row.name: row.self_s for row in account.operators} == pytest.approx(
        {"aten::mm": 300e-6, "c10d::allreduce_": 400e-6}
    )


def test_the_slowest_rank_is_the_one_that_waits_least() -> None:
    accounts = [
        Account(step_s=[1.0, 1.0], waiting_s=[waits, waits], data_s=[0, 0])
        for waits in (0.5, 0.5, 0.25, 0.45)
    ]
    said = "rank 2: 0.75 s a step without waiting for the others, 50 % more than their median of"
    assert said in slowest_text(accounts)
    text = as_text(accounts, [7, 8], "cpu")
    assert text.startswith("Steps 7 to 8, 4 processes, cpu.") and "a step of rank 2" in text
