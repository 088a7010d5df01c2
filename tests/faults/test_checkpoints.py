"""Disks that fail, fill up or lose files: no good checkpoint is deleted, no run begins again."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import lunaris.checkpoint
from lunaris.__main__ import main
from lunaris.checkpoint import Checkpoints, TrainState
from lunaris.config.compose import compose
from lunaris.metrics.records import read_rows
from lunaris.runs import checkpoint_files
from lunaris.runs.checkpoint_files import complete, find_corruption
from lunaris.runs.create import create
from lunaris.runs.facts import step_of
from lunaris.runs.run_dir import RunDir


class Disk(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def steps(run_dir: RunDir) -> list[int]:
    return sorted(step_of(path) for path in complete(run_dir.checkpoints))


def losses(run_dir: RunDir) -> list[float]:
    return [row["train/loss"] for row in read_rows(run_dir.metrics_path) if row["step"] > 0]


@pytest.mark.parametrize("times", [1, 99])
def test_a_read_error_is_no_damage(
    stopped: Callable[[], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: int,
) -> None:
    """One that passes is not seen; one that stays ends the command, and everything is kept."""
    run_dir, left = stopped(), times
    real = Path.open

    def failing(path: Path, *args: Any, **keys: Any) -> Any:
        nonlocal left
        if path.name == "__0_0.distcp" and path.parent.name == "step_00000004" and left:
            left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        patch.setattr(checkpoint_files, "_WAITS", (0.0, 0.0))
        code = main(["resume", "runs/run"])
    if times == 1:
        assert code == 0 and left == 0
        assert losses(run_dir) == losses(RunDir("whole"))
        return
    assert code == 2
    assert "step_00000004/__0_0.distcp: cannot be read (Input/output error) after 3 tries" in (
        capsys.readouterr().err
    )
    assert steps(run_dir) == [2, 4] and left < 99
    assert main(["resume", "runs/run"]) == 0
    assert losses(run_dir) == losses(RunDir("whole"))


def test_a_run_that_lost_every_file_list_does_not_begin_again(
    stopped: Callable[[], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = stopped()
    for path in complete(run_dir.checkpoints):
        (path / "files.json").unlink()
    before = run_dir.metrics_path.read_bytes()
    with pytest.warns(UserWarning, match="files.json cannot be read"):
        assert main(["resume", "runs/run"]) == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err
    assert run_dir.metrics_path.read_bytes() == before


@pytest.mark.parametrize("lost", ["files.json", "__0_0.distcp", ".metadata", "train_state.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    stopped: Callable[[], RunDir], lost: str
) -> None:
    run_dir = stopped()
    (run_dir.checkpoints / "step_00000004" / lost).unlink()
    with pytest.warns(UserWarning, match="step_00000004 is damaged, skipped"):
        assert main(["resume", "runs/run"]) == 0
    assert (run_dir.checkpoints / "damaged-step_00000004").is_dir()
    assert steps(run_dir) == [2, 4, 6, 8]
    assert losses(run_dir) == losses(RunDir("whole"))


def test_a_flipped_bit_is_damage(stopped: Callable[[], RunDir]) -> None:
    """In the middle of the weights, where loading sees nothing."""
    run_dir = stopped()
    path = run_dir.checkpoints / "step_00000004/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="step_00000004 is damaged, skipped"):
        assert main(["resume", "runs/run"]) == 0
    assert losses(run_dir) == losses(RunDir("whole"))


def test_a_checkpoint_that_cannot_be_loaded_is_skipped_too(
    stopped: Callable[[], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksums are right, and yet loading fails."""
    run_dir, real = stopped(), lunaris.checkpoint_reader.SafeReader.read_data

    def failing(reader: Any, *args: Any) -> Any:
        if "step_00000004" in str(reader.path):
            raise ValueError("no such layout")
        return real(reader, *args)

    monkeypatch.setattr(lunaris.checkpoint_reader.SafeReader, "read_data", failing)
    with pytest.warns(UserWarning, match="step_00000004 is damaged, skipped.*no such layout"):
        assert main(["resume", "runs/run"]) == 0
    assert losses(run_dir) == losses(RunDir("whole"))


def test_what_killed_processes_leave_is_removed(stopped: Callable[[], RunDir]) -> None:
    run_dir = stopped()
    for name in (".tmp-step_00000005", ".tmp-removed-step_00000001"):
        shutil.copytree(run_dir.checkpoints / "step_00000004", run_dir.checkpoints / name)
    assert main(["resume", "runs/run"]) == 0
    assert not list(run_dir.checkpoints.glob(".tmp-*"))


def test_pruning_that_is_killed_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that is cut off after any file: what is left has no checkpoint's name."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=1, async_save=False)
    checkpoints.save(model, optimizer, TrainState(step=1))

    def half(path: Path, **keys: Any) -> None:
        if path.is_dir():
            next(path.iterdir()).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.shutil, "rmtree", half)
        checkpoints.save(model, optimizer, TrainState(step=2))
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000002"]
    assert Checkpoints(tmp_path, keep_last=1, async_save=False).load_newest(model, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


# DCP leaves its file open when writing fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["before", "while writing", "at the end"])
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_stops_the_run_and_leaves_room(
    stopped: Callable[[], RunDir],
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    asynchronous: str,
) -> None:
    run_dir = stopped()
    command = ["train", *keys, f"checkpoint.async_save={asynchronous}"]
    with monkeypatch.context() as patch:
        fill_disk(patch, when)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "the checkpoint cannot be written (No space left on device" in error
    assert "Traceback" not in error
    assert run_dir.read_status()["state"] == "failed"
    assert steps(run_dir) == [2, 4] and not list(run_dir.checkpoints.glob(".tmp-*"))
    assert main(command) == 0
    assert losses(run_dir) == losses(RunDir("whole"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_run_may_train_on_without_checkpoints(
    stopped: Callable[[], RunDir],
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    run_dir = stopped()
    command = ["train", *keys, "checkpoint.on_error=continue"]
    with monkeypatch.context() as patch:
        fill_disk(patch, when, times=1)
        with pytest.warns(UserWarning, match="step_00000006: the checkpoint cannot be written"):
            assert main(command) == 0
    assert steps(run_dir) == [2, 4, 8]
    assert losses(run_dir) == losses(RunDir("whole"))


def test_the_last_checkpoint_always_stops_it(
    stopped: Callable[[], RunDir], keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = stopped()
    fill_disk(monkeypatch, "before")
    with pytest.warns(UserWarning, match="step_00000006: the checkpoint cannot be written"):
        assert main(["train", *keys, "checkpoint.on_error=continue"]) == 1
    assert run_dir.read_status()["state"] == "failed" and steps(run_dir) == [2, 4]


def test_a_disk_too_full_for_metrics_says_so(
    stopped: Callable[[], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = stopped()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("lunaris.metrics.records.MetricsFile.append", full)
        assert main(["resume", "runs/run"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device; the last checkpoint is kept" in error
    assert "Traceback" not in error and run_dir.read_status()["state"] == "failed"
    assert main(["resume", "runs/run"]) == 0
    assert losses(run_dir) == losses(RunDir("whole"))


def fill_disk(patch: pytest.MonkeyPatch, when: str, times: int = 99) -> None:
    """Let the disk be full before, while or after a checkpoint's tensors are written."""
    left = times

    def full() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    if when == "before":
        real_usage = shutil.disk_usage
        patch.setattr(
            checkpoint_files.shutil,
            "disk_usage",
            lambda path: Disk(2**30, 2**30, 100) if full() else real_usage(path),
        )
        return
    owner: Any = torch.distributed.checkpoint.filesystem if when == "while writing" else None
    owner, name = (
        (owner, "_write_item") if when == "while writing" else (lunaris.checkpoint, "sync_folder")
    )
    real = getattr(owner, name)

    def failing(*args: Any, **keys: Any) -> Any:
        if full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **keys)

    patch.setattr(owner, name, failing)


@pytest.mark.timeout(0)
def test_killed_inside_saves_with_pruning(
    stopped: Callable[[], RunDir],
    fork: Callable[..., Any],
    keys: list[str],
    long: bool,
    counted: Callable[[str, int], None],
) -> None:
    """SIGKILL at random moments while it saves each step and keeps two checkpoints."""
    stopped()
    shutil.rmtree("runs")
    more = ["trainer.max_steps=24", "checkpoint.save_interval=1", "checkpoint.keep_last=2"]
    worker = "lunaris.launch.worker"
    whole = create(compose([*keys, *more, "name=undisturbed"]), "test", [])
    assert fork(worker, str(whole.path)).wait() == 0
    run_dir = create(compose([*keys, *more]), "test", [])
    draw, kills, inside = random.Random(0), 1000 if long else 10, 0
    for _ in range(kills):
        run = fork(worker, str(run_dir.path))
        wait_for_moment(run_dir, run.running, draw)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() in (0, -signal.SIGKILL), Path("forks.log").read_text()[-2000:]
        inside += saving(run_dir)
        for path in run_dir.checkpoints.glob("step_*"):
            assert find_corruption(path) is None
        if read_rows(run_dir.metrics_path)[-1]["step"] >= 20:
            assert fork(worker, str(run_dir.path)).wait() == 0
            assert losses(run_dir) == losses(whole)
            shutil.rmtree(run_dir.path)
            run_dir = create(compose([*keys, *more]), "test", [])
    counted("kills while checkpoints were saved and pruned", kills)
    counted("of them inside a save", inside)
    assert fork(worker, str(run_dir.path)).wait() == 0
    assert losses(run_dir) == losses(whole)


@pytest.mark.timeout(0)
def test_one_of_two_sharded_ranks_is_killed(
    stopped: Callable[[], RunDir],
    fork: Callable[..., Any],
    keys: list[str],
    long: bool,
    counted: Callable[[str, int], None],
) -> None:
    """SIGKILL to one rank or both of an FSDP run; where one is left, it ends by itself."""
    stopped()
    shutil.rmtree("runs")
    more = [
        "parallelism=fsdp", "launch.processes=2", "trainer.batch_size=2", "trainer.max_steps=24",
        "checkpoint.save_interval=1", "checkpoint.keep_last=2", "launch.collective_timeout_s=20",
    ]  # fmt: skip
    whole = create(compose([*keys, *more, "name=undisturbed"]), "test", [])
    run_dir = create(compose([*keys, *more]), "test", [])

    def start(folder: RunDir) -> list[Any]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        path, worker = str(folder.path), "lunaris.launch.worker"
        return [fork(worker, path, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]

    assert [rank.wait() for rank in start(whole)] == [0, 0]
    draw, kills, inside = random.Random(0), 100 if long else 3, 0
    for _ in range(kills):
        ranks = start(run_dir)
        wait_for_moment(run_dir, ranks[0].running, draw)
        for rank in draw.choice([ranks[:1], ranks[1:], ranks]):
            os.kill(rank.pid, signal.SIGKILL)
        assert all(rank.wait() in (0, 1, -signal.SIGKILL) for rank in ranks)
        inside += saving(run_dir)
        for path in run_dir.checkpoints.glob("step_*"):
            assert find_corruption(path) is None
        if read_rows(run_dir.metrics_path)[-1]["step"] >= 20:
            assert [rank.wait() for rank in start(run_dir)] == [0, 0]
            assert losses(run_dir) == losses(whole)
            shutil.rmtree(run_dir.path)
            run_dir = create(compose([*keys, *more]), "test", [])
    counted("kills of one or both of two FSDP processes", kills)
    counted("of them inside a sharded save", inside)
    assert [rank.wait() for rank in start(run_dir)] == [0, 0]
    assert losses(run_dir) == losses(whole)


def saving(run_dir: RunDir) -> bool:
    """Return whether a checkpoint is being written or removed."""
    return any(run_dir.checkpoints.glob(".tmp-*"))


def wait_for_moment(run_dir: RunDir, running: Callable[[], bool], draw: random.Random) -> None:
    """Wait until a run that has just been started has logged two steps more, then a little longer.

    Half of the moments at least fall while a checkpoint is written.
    """
    began = len(read_rows(run_dir.metrics_path))
    while running() and len(read_rows(run_dir.metrics_path)) < began + 2:
        time.sleep(0.01)
    while running() and draw.random() < 0.98:
        if saving(run_dir) and draw.random() < 0.3:
            break
        time.sleep(0.001)
