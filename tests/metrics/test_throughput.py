from __future__ import annotations

import pytest
import torch

from lunaris import devices
from lunaris.metrics.throughput import Meter, named_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
        ("Some Other GPU", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name: str, tera: float | None) -> None:
    assert named_peak_flops(name) == (tera and tera * 1e12)


@pytest.mark.parametrize("turn", [1, -1], ids=["as it stands", "reversed"])
def test_the_order_of_the_table_decides_nothing(monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    monkeypatch.setattr(devices, "DEVICES", devices.DEVICES[::turn])
    for device in devices.DEVICES:
        assert named_peak_flops(f"NVIDIA {device.name} 80GB") == device.flops


def test_the_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu")) is None


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("lunaris.metrics.throughput.time.perf_counter", lambda: self.now)


def test_a_meter_measures_steps_but_not_what_it_is_paused_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(tokens_per_step=1000, flops_per_token=6.0, peak=24_000.0)
    for _ in range(2):
        clock.now += 1.0
        meter.step(waited=0.25)
        with meter.paused():
            clock.now += 7.0
    # 2,000 tokens in 2 s; 14 s of evaluating and saving do not count.
    assert meter.row() == {
        "perf/tokens_per_s": pytest.approx(1000.0),
        "perf/mfu": pytest.approx(0.25),
        "perf/data_wait": pytest.approx(0.25),
    }


def test_a_meter_starts_over_after_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(tokens_per_step=1000, flops_per_token=6.0, peak=None)
    clock.now += 9.0
    meter.step(waited=9.0)
    with meter.paused():
        clock.now += 5.0
    meter.row()
    clock.now += 2.0
    meter.step(waited=0.0)
    row = meter.row()
    assert row["perf/tokens_per_s"] == pytest.approx(500.0)
    assert row["perf/data_wait"] == 0.0 and row["perf/mfu"] is None
