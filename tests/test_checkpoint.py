from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.checkpoint import Checkpoints, TrainState
from lunaris.errors import UserError
from lunaris.runs.checkpoint_files import complete, find_corruption, newest
from lunaris.runs.run_dir import RunDir


def steps(run_dir: RunDir) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in complete(run_dir.checkpoints))


def spoil(path: Path) -> None:
    """Change one byte in the middle of the largest file, as a bad disk would."""
    file = max(path.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_keep_last_and_the_last_step_is_always_saved(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    cfg = tiny("trainer.max_steps=7", "checkpoint.save_interval=2", "checkpoint.keep_last=2")
    run_dir = run_here(cfg)
    assert steps(run_dir) == [6, 7]
    assert not list(run_dir.checkpoints.glob(".tmp-*"))


def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny())
    assert steps(run_dir) == [4, 8]
    reference = find_corruption(newest(run_dir.checkpoints, 8))
    assert reference is None
    spoil(run_dir.checkpoints / "step_00000008")
    with pytest.warns(UserWarning, match="step_00000008 is damaged, skipped"):
        run_here(tiny())
    assert steps(run_dir) == [4, 8]
    assert find_corruption(run_dir.checkpoints / "step_00000008") is None


def test_a_damaged_newer_checkpoint_is_set_aside_and_not_counted(
    tmp_path: Path,
) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=None, async_save=False)
    for step in (10, 20, 30):
        checkpoints.save(model, optimizer, TrainState(step=step))
    spoil(tmp_path / "step_00000030")
    shutil.copytree(tmp_path / "step_00000020", tmp_path / "step_00000020.bak")

    again = Checkpoints(tmp_path, keep_last=1, async_save=False)
    with pytest.warns(UserWarning, match="step_00000030 is damaged"):
        state = again.load_newest(model, optimizer)
    assert state is not None and state.step == 20
    again.save(model, optimizer, TrainState(step=25))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["damaged-step_00000030", "step_00000020.bak", "step_00000025"]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny())
    for path in complete(run_dir.checkpoints):
        spoil(path)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(UserError, match="every checkpoint is damaged"),
    ):
        run_here(tiny())


def test_a_half_written_checkpoint_is_not_seen(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny())
    (run_dir.checkpoints / ".tmp-step_00000099").mkdir()
    (run_dir.checkpoints / "step_00000100").mkdir()
    assert steps(run_dir) == [4, 8]
    assert newest(run_dir.checkpoints).name == "step_00000008"
    with pytest.raises(UserError, match="no checkpoint of step 5; its checkpoint steps: 8, 4"):
        newest(run_dir.checkpoints, 5)


def test_consolidated_weights_load_with_torch_alone(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny("checkpoint.consolidated=true"))
    weights = torch.load(run_dir.path / "model.pt", weights_only=True)
    assert any("experts" in name for name in weights)
    assert all(isinstance(value, torch.Tensor) for value in weights.values())
