"""Sets aside what a run that goes back to an older checkpoint leaves behind. No torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from lunaris.atomic_files import sync_folder, write_durably
from lunaris.metrics.records import read_rows
from lunaris.metrics.wandb_feed import STATE
from lunaris.runs.facts import checkpoint_folders, step_of
from lunaris.runs.run_dir import RunDir


def set_aside(run_dir: RunDir, step: int) -> Path | None:
    """Move the checkpoints after `step`, and copy the rows after it, to a folder; return it.

    It is `set_aside/NNN_after_step_STEP` in the run's folder; None where there is nothing after
    `step`. metrics.jsonl keeps the rows until the run starts, which cuts them. Only the holder of
    the lock may call this; interrupted, it is called again.
    """
    later = [path for path in checkpoint_folders(run_dir.checkpoints) if step_of(path) > step]
    rows = [row for row in read_rows(run_dir.metrics_path) if row["step"] > step]
    if not later and not rows:
        return None
    parent = run_dir.path / "set_aside"
    number = len(list(parent.glob("*_after_step_*"))) + 1
    target = parent / f"{number:03d}_after_step_{step}"
    target.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_durably(target / "metrics.jsonl", lines.encode())
    # The newest first: wherever this is interrupted, the folder holds a run that can be resumed.
    for path in later:
        path.rename(target / path.name)
        sync_folder(run_dir.checkpoints)
    # W&B takes no second row for a step: what follows is another W&B run.
    with suppress(FileNotFoundError):
        (run_dir.path / STATE).rename(target / STATE)
    sync_folder(target)
    return target
