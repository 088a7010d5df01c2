"""Heartbeats between processes; here two of them are threads of this process."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from lunaris.distributed.heartbeat import Heartbeat, record_failure

_TIMEOUT_S = 2.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """Serve the group's store, at the address that the environment names."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    yield server


@pytest.fixture
def pair(store: dist.TCPStore) -> Iterator[tuple[Heartbeat, Heartbeat, queue.Queue[str]]]:
    """Yield the heartbeats of two ranks and what rank 0 reports."""
    reports: queue.Queue[str] = queue.Queue()
    beats = (
        Heartbeat(0, 2, _TIMEOUT_S, reports.put),
        Heartbeat(1, 2, _TIMEOUT_S, lambda _: None),
    )
    for beat in beats:
        beat.start()
    yield *beats, reports
    for beat in beats:
        beat.stop()


def test_silent_rank_is_named(pair: tuple[Heartbeat, Heartbeat, queue.Queue[str]]) -> None:
    _, other, reports = pair
    other.set_phase("a micro-step")
    other._stopped.wait(0.3)
    other._stopped.set()  # It sends no more heartbeats and no "done", like a stopped process.
    report = reports.get(timeout=60)
    assert report.startswith("rank 1 has sent no heartbeat") and "a micro-step" in report


def test_rank_that_ends_is_not_missed(pair: tuple[Heartbeat, Heartbeat, queue.Queue[str]]) -> None:
    _, other, reports = pair
    other.stop()
    with pytest.raises(queue.Empty):
        reports.get(timeout=1.5 * _TIMEOUT_S)


def test_rank_in_a_long_call_of_torch_is_not_missed(
    pair: tuple[Heartbeat, Heartbeat, queue.Queue[str]],
) -> None:
    _, other, reports = pair
    with other.excused():
        other._stopped.set()  # Its thread cannot run.
        with pytest.raises(queue.Empty):
            reports.get(timeout=1.5 * _TIMEOUT_S)
    assert reports.get(timeout=60).startswith("rank 1 has sent no heartbeat")


def test_slowest_rank_is_named(pair: tuple[Heartbeat, Heartbeat, queue.Queue[str]]) -> None:
    first, other, reports = pair
    for _ in range(3):
        first.set_phase("a micro-step")
    other.set_phase("loading data")
    for beat in (first, other):
        beat._beat(99)
    assert first.slowest_ranks() == "the furthest behind: rank 1 (loading data)"


def test_lost_store_ends_the_process(store: dist.TCPStore) -> None:
    reports: queue.Queue[str] = queue.Queue()
    beat = Heartbeat(0, 1, _TIMEOUT_S, reports.put)

    def gone(count: int) -> None:
        raise dist.DistNetworkError("connection reset")

    beat._beat = gone  # type: ignore[method-assign]
    beat._thread.start()
    assert "has not answered" in reports.get(timeout=60)
    beat.stop()


def test_failure_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    record_failure("the cause")
    record_failure("its consequence")
    assert json.loads(path.read_text())["message"]["message"] == "the cause"
