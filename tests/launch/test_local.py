"""Runs on this machine with several workers, and the failures of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lunaris.launch.elastic import exit_code, run_group
from lunaris.launch.local import Local
from lunaris.runs.checkpoint_files import find_corruption

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_TWO = ["parallelism=ddp", "launch.processes=2", "trainer.batch_size=2"]


def losses(folder: Path) -> dict[int, float]:
    """Return a run's loss at each step."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in found if "train/loss" in row}


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """Return the worker of a rank, once it runs."""

    def find() -> psutil.Process | None:
        for child in psutil.Process(launcher.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        return None

    return wait_for(find, launcher)


def wait_for(condition: Callable[[], Any], launcher: subprocess.Popen[str]) -> Any:
    """Return the first true value of `condition`; fail when the launcher ends before."""
    while True:
        found = condition()
        if found:
            return found
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)


@contextmanager
def started(cfg: Any, command: list[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Freeze the run of a config and start its processes; end what is left of them."""
    from lunaris.runs.create import create

    run_dir = create(cfg, "test", [])
    process = subprocess.Popen(
        command or [sys.executable, "-m", "lunaris.launch.worker", str(run_dir.path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                left.kill()
            process.communicate()


def has_step(folder: Path, step: int) -> bool:
    """Return whether a run has logged a step."""
    return (folder / "metrics.jsonl").is_file() and max(losses(folder), default=0) >= step


def undisturbed(
    tiny: Callable[..., Any], run_here: Callable[[Any], Any], *more: str
) -> dict[int, float]:
    """Return the losses of the same run in one process."""
    return losses(run_here(tiny("trainer.batch_size=4", *more, name="undisturbed")).path)


def test_one_process_runs_in_place(tiny: Callable[..., Any]) -> None:
    cfg = tiny()
    assert Local.of(cfg).submit(cfg, "lunaris train", []) == 0
    folder = Path(cfg.out_dir)
    assert max(losses(folder)) == 8
    assert "step 8/8" in (folder / "logs" / "rank_0.log").read_text()


def test_training_outlives_the_reader_of_its_output(tiny: Callable[..., Any]) -> None:
    cfg = tiny("trainer.max_steps=60", "trainer.eval_interval=60")
    with started(cfg) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline().startswith("run ")
        launcher.stdout.close()
        launcher.stdout = None
        _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, err
    log = (Path(cfg.out_dir) / "logs" / "rank_0.log").read_text()
    assert "step 60/60" in log and "Error" not in log


def test_two_workers_write_one_folder(tiny: Callable[..., Any], run_here: Any) -> None:
    cfg = tiny(*_TWO)
    with started(cfg) as launcher:
        out, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert out.count("step 8/8") == 1
    folder = Path(cfg.out_dir)
    assert losses(folder) == pytest.approx(undisturbed(tiny, run_here), rel=1e-6)
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def test_torchrun_is_the_same(tiny: Callable[..., Any], run_here: Any, tmp_path: Path) -> None:
    overrides = [
        "data=synthetic", "data.n_tokens=20000", "data.vocab_size=64", "moe=switch",
        "moe.n_experts=4", "optimizer=adamw",
        "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1",
        "model.max_seq_len=16", "model.multiple_of=8", "trainer.max_steps=4",
        "trainer.batch_size=2", "trainer.log_interval=1", "trainer.device=cpu",
        "trainer.eval_interval=4", "trainer.eval_steps=2", "parallelism=fsdp",
        f"out_dir={tmp_path}/torchrun",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", "-m", "lunaris", "train", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = undisturbed(tiny, run_here, "trainer.max_steps=4")
    assert losses(tmp_path / "torchrun") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_saving_in_the_background_disturbs_nothing(
    tiny: Callable[..., Any], parallelism: str
) -> None:
    # One save runs at every step; its collectives must not mix with those of training.
    keys = [*_TWO, f"parallelism={parallelism}", "checkpoint.save_interval=1"]
    keys += ["checkpoint.consolidated=true", "checkpoint.keep_last=null", "trainer.eval_interval=2"]
    weights = {}
    for background in ("false", "true"):
        cfg = tiny(*keys, f"checkpoint.async_save={background}", name=f"async_{background}")
        with started(cfg) as launcher:
            _, err = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, err
        folder = Path(cfg.out_dir)
        steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert steps == [f"step_{step:08d}" for step in range(1, 9)]
        assert all(find_corruption(folder / "checkpoints" / step) is None for step in steps)
        weights[background] = torch.load(folder / "model.pt", weights_only=True)
    assert weights["true"].keys() == weights["false"].keys()
    assert all(
        torch.equal(weights["true"][name], weights["false"][name]) for name in weights["true"]
    )


def test_killed_worker_restarts_the_group(tiny: Callable[..., Any], run_here: Any) -> None:
    long = ["trainer.max_steps=60", "checkpoint.save_interval=5", "trainer.eval_interval=60"]
    cfg = tiny(*_TWO, *long, "launch.max_restarts=1")
    folder = Path(cfg.out_dir)
    with started(cfg) as launcher:
        wait_for(lambda: has_step(folder, 12), launcher)
        worker(launcher, 1).kill()
        _, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert "killed by SIGKILL" in err and "starts again" in err
    assert json.loads((folder / "status.json").read_text())["attempts"] == 2
    found = losses(folder)
    assert list(found) == list(range(1, 61))
    assert found == pytest.approx(undisturbed(tiny, run_here, *long), rel=1e-5)


def test_stopped_worker_is_named(tiny: Callable[..., Any]) -> None:
    timeout_s = 16
    long = ["trainer.max_steps=100000", f"launch.collective_timeout_s={timeout_s}"]
    cfg = tiny(*_TWO, *long)
    with started(cfg) as launcher:
        wait_for(lambda: has_step(Path(cfg.out_dir), 5), launcher)
        hung = worker(launcher, 1)
        hung.suspend()
        began = time.monotonic()
        _, err = launcher.communicate()
        took = time.monotonic() - began
        assert not hung.is_running()
    assert launcher.returncode == 1
    assert "rank 1 has sent no heartbeat" in err
    # The promise is the timeout; a machine busy with other tests gets as much again.
    assert took < 2 * timeout_s


def test_signal_saves_and_stops(tiny: Callable[..., Any], run_here: Any) -> None:
    long = ["trainer.max_steps=60", "checkpoint.save_interval=1000", "trainer.eval_interval=60"]
    cfg = tiny(*_TWO, *long, "launch.max_restarts=3")
    folder = Path(cfg.out_dir)
    with started(cfg) as launcher:
        wait_for(lambda: has_step(folder, 5), launcher)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate()
    assert launcher.returncode == 3, err
    assert err.count("a checkpoint is saved") == 1
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped" and status["attempts"] == 1
    assert 5 <= status["step"] < 60

    with started(cfg) as launcher:
        _, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert losses(folder) == pytest.approx(undisturbed(tiny, run_here, *long), rel=1e-5)


@pytest.mark.parametrize(("processes", "more"), [(1, []), (2, _TWO)], ids=["one", "two"])
def test_signal_while_torch_is_imported_stops_the_run_in_order(
    tiny: Callable[..., Any], processes: int, more: list[str]
) -> None:
    """No step is done, so that there is nothing to save; a process alone builds no model."""
    cfg = tiny("trainer.max_steps=100000", *more)
    folder = Path(cfg.out_dir)
    with started(cfg) as launcher:
        logs = (folder / "logs").glob
        wait_for(lambda: len(list(logs("rank_*.log"))) == processes, launcher)
        launcher.terminate()
        _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 3, err
    assert err.count("stopped by SIGTERM while") == 1
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    assert not list((folder / "checkpoints").glob("*"))


def test_wrong_input_is_one_message(tiny: Callable[..., Any], tmp_path: Path) -> None:
    import numpy as np

    shards = tmp_path / "shards"
    shards.mkdir()
    np.save(shards / "a.npy", np.zeros(4000, dtype=np.uint16))
    cfg = tiny(*_TWO, "data=shards", f"data.dir={shards}", "launch.max_restarts=3")
    # Found by the workers alone: at compose time the folder was sound.
    (shards / "a.npy").unlink()
    with started(cfg) as launcher:
        out, err = launcher.communicate()
    assert launcher.returncode == 2, out + err
    assert err.count("error:") == 1 and str(shards) in err
    assert "Traceback" not in out + err


def test_a_group_leaves_no_thread_behind(tmp_path: Path) -> None:
    """One that is within C++ code of the rendezvous when the interpreter ends would abort it."""
    before = threading.active_count()
    assert run_group(tmp_path / "none", 2, max_restarts=0, timeout_s=60) == 2
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([3, 3], 3), ([2], 2), ([2, 1], 2), ([1], 1), ([-9], 1), ([3, -9], 1)],
)
def test_exit_code_of_a_group(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected
