from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.errors import UserError
from lunaris.lifecycle import explain_out_of_memory, track_status
from lunaris.runs.run_dir import RunDir


def test_a_run_that_ends_well_keeps_no_error_of_another_process(
    tmp_path: Path, tiny: Callable[..., Any]
) -> None:
    run_dir = RunDir(tmp_path)
    with track_status(tiny(), run_dir):
        # As a job that starts while this run has the folder's lock.
        run_dir.write_status(last_error="UserError: in use")
    status = run_dir.read_status()
    assert (status["state"], status["last_error"]) == ("done", None)


@pytest.mark.parametrize(
    ("before", "step", "error", "after"),
    [
        ("done", 3, UserError("its data moved"), "done"),
        ("paused", 3, UserError("its data moved"), "paused"),
        # It has trained on since.
        ("paused", 5, UserError("out of memory"), "failed"),
        ("paused", 3, RuntimeError("x"), "failed"),
        ("stopped", 3, UserError("its data moved"), "failed"),
    ],
)
def test_what_has_ended_well_stays_so_where_it_cannot_start_again(
    tmp_path: Path, tiny: Callable[..., Any], before: str, step: int, error: Exception, after: str
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.write_status(state=before, step=3)
    with pytest.raises(type(error)), track_status(tiny(), run_dir):
        run_dir.write_status(step=step)
        raise error
    assert run_dir.read_status()["state"] == after


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"out of memory here \(MemoryError\)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nat c10"), "9 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "Tried 2 GiB"),
    ],
)
def test_too_little_memory_is_explained(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message), explain_out_of_memory("here"):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("here"):
        raise RuntimeError("another")
