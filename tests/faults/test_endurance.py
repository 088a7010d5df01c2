"""Many steps: memory, open files and threads stay as they are. The time of a step is printed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from lunaris.metrics.records import read_rows

pytestmark = pytest.mark.timeout(0)

_KEYS = [
    "data=synthetic", "model.d_model=16", "model.n_layers=1", "model.n_heads=2",
    "model.n_kv_heads=1", "model.max_seq_len=16", "model.multiple_of=8", "moe.n_experts=4",
    "trainer.batch_size=2", "trainer.log_interval=10", "trainer.eval_interval=100",
    "trainer.eval_steps=2", "trainer.device=cpu", "checkpoint.save_interval=100",
    "checkpoint.keep_last=2", "schedule=constant", "name=long",
]  # fmt: skip


class Sample(NamedTuple):
    """What a process holds: resident memory in bytes, open files, threads, all at a step."""

    step: int
    memory: int
    files: int
    threads: int


def take(process: psutil.Process, metrics: Path) -> Sample | None:
    """Return what the process holds now, or None before its first row."""
    rows = read_rows(metrics)
    if not rows:
        return None
    with process.oneshot():
        found = process.memory_info().rss, process.num_fds(), process.num_threads()
    return Sample(rows[-1]["step"], *found)


def test_many_steps_hold_no_more_than_few(
    long: bool, counted: Callable[[str, int], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    steps = 20_000 if long else 2_000
    command = [sys.executable, "-m", "lunaris", "train", *_KEYS, f"trainer.max_steps={steps}"]
    metrics = Path("runs/long/metrics.jsonl")
    samples: list[Sample] = []
    with Path("out").open("w") as out, subprocess.Popen(
        command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as started:  # fmt: skip
        process = psutil.Process(started.pid)
        while started.poll() is None:
            try:
                sample = take(process, metrics)
            except psutil.Error:
                break  # It has just ended.
            samples += [sample] if sample else []
            time.sleep(0.1)
    assert started.returncode == 0, Path("out").read_text()
    counted("steps in one process", steps)
    # After the first tenth every cache is filled; the end also draws the plot.
    settled = [sample for sample in samples if steps * 0.1 < sample.step < steps * 0.98]
    half = len(settled) // 2
    assert half > 5
    early, late = settled[:half], settled[half:]
    # A file is open, and a thread runs, for as long as a save takes: what stays is the least.
    for name, bound, allowed in (("files", min, 0), ("threads", min, 0), ("memory", max, 2**22)):
        first = bound(getattr(sample, name) for sample in early)
        assert bound(getattr(sample, name) for sample in late) <= first + allowed, name
    folders = list(Path("runs/long/checkpoints").iterdir())
    assert len(folders) == 2
    rates = [row["perf/tokens_per_s"] for row in read_rows(metrics) if "perf/tokens_per_s" in row]
    ends = statistics.median(rates[-len(rates) // 4 :]) / statistics.median(
        rates[: len(rates) // 4]
    )
    with capsys.disabled():
        print(f"\nspeed of the last quarter of {steps:,} steps over that of the first: {ends:.3f}")
