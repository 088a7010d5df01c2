"""Steps that are recorded: their files, and that the run is the one without them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.__main__ import main
from lunaris.errors import Stopped
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

# Its layers are routed but for the first, and the evaluation at step 4 falls into the window.
_KEYS = ["moe.first_dense_layers=1", "trainer.max_steps=6", "trainer.eval_interval=4"]
_WINDOW = "trainer.profile_steps=[3,5]"


def numbers(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the rows of a run without the times in them."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("perf/", "time"))}
        for row in read_rows(run_dir.metrics_path)
    ]


def weights(run_dir: RunDir) -> dict[str, torch.Tensor]:
    loaded: dict[str, Any] = torch.load(run_dir.path / "model.pt")
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def steps_of(folder: Path) -> list[int]:
    """Return the steps of a recording, whose trace must hold them and no others."""
    steps = json.loads((folder / "steps.json").read_text())["steps"]
    trace = json.loads(gzip.decompress((folder / "rank0.trace.json.gz").read_bytes()))
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {name for name in names if name.startswith("lunaris/step/")} == {
        f"lunaris/step/{step}" for step in steps
    }
    return steps


def test_a_recorded_run_has_the_bits_of_one_without(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*_KEYS, "checkpoint.consolidated=true"]
    plain = run_here(tiny(*keys, name="plain"))
    assert not list(plain.path.glob("profile*"))
    capsys.readouterr()
    recorded = run_here(tiny(*keys, _WINDOW, name="recorded"))
    printed = capsys.readouterr().out

    assert numbers(recorded) == numbers(plain)
    a, b = weights(recorded), weights(plain)
    assert len(a) > 10 and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    folder = recorded.path / "profile"
    assert f"profile: Steps 3 to 5 in {folder}" in printed and "rank 0 alone" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank0.trace.json.gz", "steps.json", "steps.txt",
    ]  # fmt: skip
    assert steps_of(folder) == [3, 4, 5]
    (rank,) = json.loads((folder / "steps.json").read_text())["ranks"]
    groups = {"attention", "experts", "router", "feed-forward", "embedding", "optimizer"}
    assert groups | {"vocabulary loss", "waiting for data"} <= rank["groups"].keys()
    assert sum(rank["groups"].values()) == pytest.approx(rank["mean_s"])
    # The forward of two layers: the evaluation after step 4 does not count.
    attended = [row for row in rank["operators"] if row["name"].endswith("attention_for_cpu")]
    assert [row["calls"] for row in attended] == [2]
    text = (folder / "steps.txt").read_text()
    assert "aten::mm" in text and "attention" in text and "step 4" in text


def test_a_stopped_recording_is_kept_and_the_next_start_records_the_rest(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lunaris.train

    real_step = lunaris.train.train_step

    def interrupted(run: Any, batch: Any) -> Any:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(run, batch)

    cfg = tiny(*_KEYS, _WINDOW)
    with monkeypatch.context() as patch:
        patch.setattr(lunaris.train, "train_step", interrupted)
        with pytest.raises(Stopped, match="at step 4"):
            run_here(cfg)
    first = Path(cfg.out_dir) / "profile"
    assert steps_of(first) == [3, 4]
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    # The key is no part of the identity: with another window the folder is continued.
    run_dir = run_here(tiny(*_KEYS, "trainer.profile_steps=[2,6]"))
    assert steps_of(run_dir.path / "profile_2") == [5, 6]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    # After the window nothing is recorded.
    assert main(["resume", str(run_dir.path), "trainer.max_steps=7"]) == 0
    assert {path.name for path in run_dir.path.glob("profile*")} == {"profile", "profile_2"}


def test_the_window_may_be_given_when_a_run_is_resumed(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny(*_KEYS, "trainer.stop_at=2"))
    command = ["resume", str(run_dir.path), "trainer.stop_at=null", "trainer.profile_steps=[4,4]"]
    assert main(command) == 0
    assert steps_of(run_dir.path / "profile") == [4]


def test_a_step_that_fails_leaves_its_trace(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lunaris.train

    def broken(run: Any, batch: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(lunaris.train, "train_step", broken)
    cfg = tiny(*_KEYS, "trainer.profile_steps=[1,5]")
    with pytest.raises(ZeroDivisionError):
        run_here(cfg)
    found = [path.name for path in Path(cfg.out_dir, "profile").iterdir()]
    assert found == ["rank0.trace.json.gz"]


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: object, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    run_dir = run_here(tiny(*_KEYS, _WINDOW))
    assert run_dir.read_status()["state"] == "done"
    said = "profile: is not complete, the run continues: rank 0: OSError: [Errno 28] No space left"
    assert said in capsys.readouterr().out


_SLOW_RANK = """
import sys, time
import lunaris.train
from lunaris.run import execute
from lunaris.runs.run_dir import RunDir

real_step = lunaris.train.train_step

def slow(run, batch):
    if run.parallelism.data_rank == 1:
        time.sleep(0.2)
    return real_step(run, batch)

lunaris.train.train_step = slow
execute(RunDir(sys.argv[1]).read_config(), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_the_slowest_of_two_processes_is_named(tiny: Callable[..., Any], parallelism: str) -> None:
    from lunaris.runs.create import create

    keys = [f"parallelism={parallelism}", "launch.processes=2", _WINDOW]
    run_dir = create(tiny(*_KEYS, *keys), "test", [])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _SLOW_RANK, str(run_dir.path)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert "profile: the slowest is rank 1: " in outputs[0]
    folder = run_dir.path / "profile"
    assert (folder / "rank1.trace.json.gz").is_file() and steps_of(folder) == [3, 4, 5]
    found = json.loads((folder / "steps.json").read_text())
    fast, slow = found["ranks"]
    assert found["slowest_rank"] == 1
    # Both take as long; what differs is how much of it one waits for the other.
    assert fast["mean_s"] > 0.2 and slow["own_s"] - fast["own_s"] > 0.1
    assert fast["groups"]["communication"] > 0.1
    assert sum(fast["groups"].values()) == pytest.approx(fast["mean_s"], rel=1e-6)
