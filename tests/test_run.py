"""Every option of every group is composed, instantiated and stepped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.config.schema.root import SCHEMAS
from lunaris.errors import UserError
from lunaris.metrics.records import read_rows
from lunaris.run import explain_out_of_memory
from lunaris.runs.run_dir import RunDir

# Sent elsewhere or made from text first; stepped in tests/launch, tests/slurm and tests/data.
_ELSEWHERE = {("launch", "slurm"), ("data", "text"), ("data", "hf"), ("data", "shards")}
OPTIONS = [
    (group, option)
    for group, options in SCHEMAS.items()
    for option in options
    if (group, option) not in _ELSEWHERE
]


@pytest.mark.filterwarnings("ignore:.*wandb.*", "ignore::DeprecationWarning:wandb")
@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_trains(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], group: str, option: str
) -> None:
    overrides = [f"{group}={option}", "trainer.max_steps=3"]
    cfg = tiny(*overrides)
    run_dir = run_here(cfg)
    losses = [row["train/loss"] for row in read_rows(run_dir.metrics_path)[1:]]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["qk_reorder", "pre"])
def test_every_precision_and_norm_trains(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], precision: str, norm: str
) -> None:
    run_dir = run_here(
        tiny(
            f"trainer.precision={precision}",
            f"model.norm={norm}",
            "trainer.max_steps=40",
            "optimizer.learning_rate=1e-2",
        )
    )
    rows = read_rows(run_dir.metrics_path)[1:]
    assert rows[-1]["train/main_loss"] < rows[0]["train/main_loss"] - 0.05


def test_a_vocabulary_smaller_than_the_datas_is_refused(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    with pytest.raises(UserError, match="model.vocab_size=63"):
        run_here(tiny("model.vocab_size=63"))


def test_dropping_the_default_experiment_leaves_a_folder_that_names_its_config(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], tmp_path: Path
) -> None:
    run_dir = run_here(tiny("trainer.max_steps=1"))
    assert run_dir.path == tmp_path / "runs/run"
    saved = run_dir.read_config()
    assert saved.trainer.max_steps == 1 and saved.out_dir == str(run_dir.path)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), r"out of memory here \(MemoryError\)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nat c10"), "9 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "Tried 2 GiB"),
    ],
)
def test_too_little_memory_is_told(error: Exception, told: str) -> None:
    with pytest.raises(UserError, match=told), explain_out_of_memory("here"):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("here"):
        raise RuntimeError("another")
