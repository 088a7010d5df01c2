"""Which device a process takes, and how a session ends."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lunaris.distributed import session
from lunaris.errors import UserError
from lunaris.evaluate import Evaluator
from lunaris.runs.run_dir import RunDir


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


@pytest.mark.slow
def test_only_the_first_evaluation_may_take_longer(
    run_two: Callable[[str], list[subprocess.CompletedProcess[str]]],
) -> None:
    waits, slow = run_two(
        """
        session.end_first_step()
        for count in (1, 2):
            with session.evaluation():
                if session.rank() == 1:
                    time.sleep(9)
                torch.distributed.all_reduce(torch.ones(1))
            print("evaluated", count, flush=True)
        """
    )
    assert waits.stdout.split("\n")[:2] == ["evaluated 1", ""] and waits.returncode == 1
    assert "a collective timed out" in waits.stderr


def test_a_resumed_run_may_evaluate_slowly_at_first(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step is done long before it evaluates, which compiles what only that runs."""
    done: list[str] = []
    total = Evaluator._total
    monkeypatch.setattr(
        Evaluator, "_total", lambda *a, **k: done.append("evaluation") or total(*a, **k)
    )
    monkeypatch.setattr(
        session, "set_collective_timeout", lambda limit, exempt: done.append(str(limit))
    )
    run_here(tiny("parallelism=fsdp", "trainer.stop_at=2"))
    assert done == ["evaluation", "0:02:00"]
    done.clear()
    run_here(tiny("parallelism=fsdp"))
    assert done == ["0:02:00", "0:30:00", "evaluation", "0:02:00", "evaluation"]
