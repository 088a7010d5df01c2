"""Signals while a run starts, builds its model, evaluates or steps: each is answered soon.

The run that is started again has the numbers of one that no signal met.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lunaris.evaluate
import lunaris.run
from lunaris.errors import Stopped
from lunaris.metrics.records import read_rows
from lunaris.runs.checkpoint_files import complete
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir

EXACT = ("train/", "val/", "moe/")


def exact_rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return a run's rows without what depends on the machine."""
    rows = read_rows(run_dir.metrics_path)
    return [{k: v for k, v in r.items() if k == "step" or k.startswith(EXACT)} for r in rows]


# The batch of an evaluation before which the signal comes, counted over the run: two batches an
# evaluation, at steps 0, 4 and 8.
@pytest.mark.parametrize(
    ("batch", "at", "kept"),
    [(1, 0, []), (3, 4, [4]), (5, 8, [4, 8])],
    ids=["first", "middle", "last"],
)
def test_an_evaluation_is_left_before_its_next_batch(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    at: int,
    kept: list[int],
) -> None:
    whole = run_here(tiny("moe.balancing=bias", name="whole"))
    real, calls = lunaris.evaluate.check_ids, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lunaris.evaluate, "check_ids", interrupted)
        with pytest.raises(Stopped, match=f"SIGTERM.* step {at}"):
            run_here(tiny("moe.balancing=bias", name="parts"))
    assert calls == batch
    parts = RunDir(whole.path.parent / "parts")
    assert sorted(int(p.name[5:]) for p in complete(parts.checkpoints)) == kept
    assert at not in [row["step"] for row in read_rows(parts.metrics_path)]
    assert parts.read_status()["state"] == "stopped"

    # A second signal in the same evaluation loses nothing either.
    with monkeypatch.context() as patch:
        patch.setattr(lunaris.evaluate, "check_ids", interrupted)
        calls = batch - 1
        with pytest.raises(Stopped, match=f"SIGTERM.* step {at}"):
            run_here(tiny("moe.balancing=bias", name="parts"))
    run_here(tiny("moe.balancing=bias", name="parts"))
    assert exact_rows(parts) == exact_rows(whole)
    assert parts.read_status()["best_val_loss"] == whole.read_status()["best_val_loss"]


def test_a_row_that_was_completed_is_not_logged_twice(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint still has the row as unfinished when a crash comes before the next one."""
    whole = run_here(tiny(name="whole"))
    real, calls = lunaris.evaluate.check_ids, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    def crashed(*args: Any) -> None:
        raise RuntimeError("a crash")

    with monkeypatch.context() as patch:
        patch.setattr(lunaris.evaluate, "check_ids", interrupted)
        with pytest.raises(Stopped):
            run_here(tiny(name="parts"))
    with monkeypatch.context() as patch:
        patch.setattr("lunaris.train.train_step", crashed)
        with pytest.raises(RuntimeError):
            run_here(tiny(name="parts"))
    assert read_rows(whole.path.parent / "parts/metrics.jsonl")[-1]["step"] == 4
    assert exact_rows(run_here(tiny(name="parts"))) == exact_rows(whole)


def test_a_model_that_is_being_built_does_not_hold_a_signal_up(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **keys: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal waited")

    with monkeypatch.context() as patch:
        patch.setattr(lunaris.run, "bare_model", slow)
        with pytest.raises(Stopped, match="by SIGTERM while building the model"):
            run_here(tiny())
    assert run_here(tiny()).read_status()["state"] == "done"


@pytest.mark.slow
def test_signals_to_one_rank_of_two_lose_nothing(
    tiny: Callable[..., Any], long: bool, counted: Callable[[str, int], None]
) -> None:
    """At random moments, from the start of the interpreter to the end of the run."""
    keys = [
        "launch.processes=2", "trainer.batch_size=2", "parallelism=fsdp", "moe.balancing=bias",
        "trainer.max_steps=24", "trainer.eval_interval=2", "checkpoint.save_interval=10",
    ]  # fmt: skip
    whole = create(tiny(*keys, name="whole"), "test", [])
    began = time.monotonic()
    assert start_group(whole.path) == [0, 0]
    lasts = time.monotonic() - began
    draw, tries, stops = random.Random(0), 100 if long else 3, 0
    parts = create(tiny(*keys, name="parts"), "test", [])
    for _ in range(tries):
        if parts.read_status().get("state") == "done":
            assert exact_rows(parts) == exact_rows(whole)
            shutil.rmtree(parts.path)
            parts = create(tiny(*keys, name="parts"), "test", [])
        number = draw.choice([signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
        codes = start_group(parts.path, (draw.randrange(2), draw.uniform(0.5, lasts), number))
        assert codes in ([0, 0], [3, 3]), codes
        stops += codes == [3, 3]
    while parts.read_status().get("state") != "done":
        assert start_group(parts.path) == [0, 0]
    assert exact_rows(parts) == exact_rows(whole)
    assert stops > 0
    counted("signals to one rank of two", tries)


def start_group(path: Path, hit: tuple[int, float, int] | None = None) -> list[int]:
    """Train the run with two workers and return their exit codes.

    hit: the rank that gets a signal, after how many seconds, and which.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    with Path("group.log").open("a") as log:
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "lunaris.launch.worker", str(path)],
                env=shared | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=log,
                stderr=log,
            )
            for rank in ("0", "1")
        ]
        try:
            if hit is not None:
                rank, delay, number = hit
                time.sleep(delay)
                workers[rank].send_signal(number)
            return [worker.wait(timeout=250) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
