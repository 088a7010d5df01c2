"""Which device a process takes, and how a session ends."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

from lunaris.distributed import session
from lunaris.errors import UserError


def test_a_session_leaves_no_group_behind() -> None:
    with session.join("cpu", 10.0) as device:
        assert device == torch.device("cpu") == session.device()
        session.ensure_group()
        session.end_first_step()
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
    assert session.current() is None


def test_absent_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="trainer.device=cuda"):
        session.choose_device("cuda")


def test_each_process_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert session.choose_device(None) == torch.device("cuda", 1)
    assert session.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="at most one process a device"):
        session.choose_device(None)
    # SLURM may show a task only the device that it assigned to the task.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert session.choose_device(None) == torch.device("cuda", 0)


@pytest.mark.slow
def test_stuck_process_is_named_when_a_collective_times_out(
    run_two: Callable[[str], list[subprocess.CompletedProcess[str]]],
) -> None:
    """The stuck process still sends heartbeats, so that only the collective shows the hang."""
    waits, stuck = run_two(
        """
        session.end_first_step()
        for _ in range(3):
            session.set_phase("a micro-step")
            torch.distributed.all_reduce(torch.ones(1))
        session.set_phase("a micro-step" if session.rank() == 0 else "reading a file")
        if session.rank() == 1:
            time.sleep(12)
        session.set_phase("the end of a step")
        torch.distributed.all_reduce(torch.ones(1))
        """
    )
    assert waits.returncode == 1 and stuck.returncode == 1
    assert "a collective timed out; the furthest behind: rank 1 (reading a file)" in waits.stderr
