"""Two commands that start one run at the same time: one trains it, the other leaves it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lunaris.metrics.records import read_rows
from lunaris.runs.checkpoint_files import find_corruption
from lunaris.runs.run_dir import RunDir


@pytest.mark.timeout(0)
def test_one_of_two_starters_trains(
    stopped: Callable[[], RunDir], keys: list[str], long: bool, counted: Callable[[str, int], None]
) -> None:
    """Of a fresh run and of one that continues; the second starts 0 to 0.9 s after the first."""
    tries = 40 if long else 3
    command = [sys.executable, "-m", "lunaris", "train", *keys]
    for i in range(tries):
        run_dir = stopped()
        if i % 2:
            shutil.rmtree("runs")
        whole = [
            (row["step"], row.get("train/loss")) for row in read_rows(Path("whole/metrics.jsonl"))
        ]
        started = []
        for wait_s in (0.0, i * 3 % 10 / 10):
            time.sleep(wait_s)
            started.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
        said = [process.communicate() for process in started]
        errors = [error for _, error in said]
        assert sum("step 8/8" in out for out, _ in said) == 1, said
        codes = sorted(process.returncode for process in started)
        # Where the first is done before the second looks, the second has nothing to do.
        assert codes in ([0, 2], [0, 0]), errors
        for process, error in zip(started, errors, strict=True):
            assert "Traceback" not in error
            assert process.returncode == 0 or "in use by process" in error, error
        rows = [(row["step"], row.get("train/loss")) for row in read_rows(run_dir.metrics_path)]
        assert rows == whole
        assert run_dir.read_status()["state"] == "done"
        assert not run_dir.read_status().get("last_error")
        for path in run_dir.checkpoints.glob("step_*"):
            assert find_corruption(path) is None
    counted("pairs of starters", tries)
