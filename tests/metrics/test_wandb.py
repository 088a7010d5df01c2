"""W&B behind a server that works, is slow, breaks or hangs: training loses nothing and ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.config.compose import compose
from lunaris.continuation.set_aside import set_aside
from lunaris.metrics.loggers import LocalLogger, Loggers
from lunaris.metrics.records import read_rows
from lunaris.metrics.wandb_feed import STATE, FeedState, read_state, start_state
from lunaris.metrics.wandb_logger import WandbLogger
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

_KEYS = {"entity": None, "group": None, "tags": [], "init_timeout_s": 4.0, "finish_timeout_s": 20.0}
_TINY = [
    "data=synthetic", "moe=none", "model.d_model=16", "model.n_layers=1", "model.n_heads=2",
    "model.n_kv_heads=1", "model.max_seq_len=16", "trainer.batch_size=2", "trainer.max_steps=12",
    "trainer.log_interval=2", "trainer.eval_interval=6", "trainer.eval_steps=1",
]  # fmt: skip


def begin(path: Path, mode: str | None, step: int = 0, last: int = 8, **keys: Any) -> Loggers:
    """Start the loggers of a run of `last` steps after step `step`."""
    cfg = compose(["name=x", f"out_dir={path}", f"trainer.max_steps={last}"])
    if not RunDir(path).config_path.is_file():
        create(cfg, "test", [])
    wandb = WandbLogger(**({"project": "p", "mode": mode} | _KEYS | keys))
    loggers = Loggers({"local": LocalLogger(), "wandb": wandb})
    loggers.start(RunDir(path), cfg, step)
    return loggers


def log(loggers: Loggers, steps: range) -> None:
    for step in steps:
        loggers.tick(step)
        loggers.log({"step": step, "train/loss": 9.0 - step, "moe/layer_00/load": [0.25, 0.75]})


def state_of(path: Path) -> FeedState:
    state = read_state(RunDir(path))
    assert state is not None
    return state


def wait_for(condition: Callable[[], Any], path: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, (path / "logs/wandb.log").read_text()
        time.sleep(0.05)


def use(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("mode", "sent", "said"),
    [
        ("good", True, ""),
        ("slow", True, ""),
        ("broken", False, "W&B does not have all of this run (CommError"),
        ("hole", False, "W&B does not have all of this run (CommError"),
        ("hang_rows", False, "W&B does not have all of this run (no answer in 8 s"),
        ("deny_rows", False, "W&B does not have all of this run (ConnectionError: W&B refused the"),
    ],
)
def test_whatever_the_server_does(
    mode: str, sent: bool, said: str, serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with serving(mode) as server:
        use(monkeypatch, server.env)
        timeout = 60.0 if sent else 8.0
        loggers = begin(tmp_path, None, init_timeout_s=timeout / 2, finish_timeout_s=timeout)
        log(loggers, range(9))
        began = time.monotonic()
        loggers.finish()
        assert time.monotonic() - began < timeout + 5
        rows = server.rows
        out = capsys.readouterr().out
        if not sent:
            assert said in out and f"`lunaris wandb-sync {tmp_path}` sends it" in out
            # What W&B does not have is sent once it answers.
            server.mode = "good"
            assert main(["wandb-sync", str(tmp_path)]) == 0
            assert f"9 rows; http://127.0.0.1:{server.server_port}/me/p/" in capsys.readouterr().out
        assert sent is ("wandb-sync" not in out)
        assert [rows[i]["train/loss"] for i in sorted(rows)] == [9.0 - step for step in range(9)]
        # A second time nothing is lost and nothing doubled.
        assert main(["wandb-sync", str(tmp_path)]) == 0 and sorted(rows) == list(range(9))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(9))


@pytest.mark.parametrize("mode", ["hang_rows", "dead"])
def test_a_server_that_comes_back_gets_every_row(
    mode: str, serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It fails half-way through the run and answers again before the end."""
    with serving() as server:
        use(monkeypatch, server.env)
        loggers = begin(tmp_path, None, last=12, init_timeout_s=30.0, finish_timeout_s=90.0)
        log(loggers, range(4))
        wait_for(lambda: server.rows, tmp_path)
        server.mode = mode
        log(loggers, range(4, 8))
        time.sleep(3)
        server.mode = "good"
        log(loggers, range(8, 13))
        loggers.finish()
        assert sorted(server.rows) == list(range(13))
        assert "wandb-sync" not in capsys.readouterr().out


def test_expert_use_is_one_histogram_a_layer(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        use(monkeypatch, server.env)
        loggers = begin(tmp_path, None, last=1)
        loggers.log({"step": 1, "val/loss": 4.0, "moe/layer_00/load": [0.25, 0.75]})
        loggers.tick(1)
        loggers.finish()
        chart = server.rows[1]["moe/layer_00/load_chart"]
        assert chart["values"] == [0.25, 0.75] and chart["bins"] == [0, 1, 2]


def test_a_resumed_run_continues_its_wandb_run(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        use(monkeypatch, server.env)
        loggers = begin(tmp_path, None)
        log(loggers, range(6))
        loggers.finish()
        first = state_of(tmp_path)
        # Killed after the checkpoint of step 3; elsewhere the environment names another project.
        monkeypatch.setenv("WANDB_PROJECT", "other")
        loggers = begin(tmp_path, None, step=3, project=None)
        log(loggers, range(4, 9))
        loggers.finish()
        again = state_of(tmp_path)
        assert (again.id, again.project, again.finished) == (first.id, "p", True)
        assert sorted(server.rows) == list(range(9))
        # A run that goes back to an older checkpoint gets other rows: it is another W&B run.
        set_aside(RunDir(tmp_path), 3)
        assert start_state(RunDir(tmp_path), {}).id != first.id


def test_offline_each_attempt_holds_all_rows(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    offline_steps: Callable[[Path], list[int]],
) -> None:
    for first, step in ((range(6), 0), (range(4, 9), 3)):
        loggers = begin(tmp_path, "offline", step=step)
        log(loggers, first)
        loggers.finish()
    assert offline_steps(tmp_path) == list(range(9))
    assert "W&B is offline; `lunaris wandb-sync" in capsys.readouterr().out
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(state_of(tmp_path).id in folder.name for folder in folders)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_its_service_loses_no_row(
    number: signal.Signals, tmp_path: Path, offline_steps: Callable[[Path], list[int]]
) -> None:
    """At preemption SLURM signals every process of a job, W&B's service too."""
    loggers = begin(tmp_path, "offline")
    log(loggers, range(4))
    wait_for(lambda: state_of(tmp_path).rows == 4, tmp_path)
    for child in psutil.Process().children(recursive=True):
        if number == signal.SIGTERM or "wandb-core" in child.name():
            child.send_signal(number)
    log(loggers, range(4, 9))
    loggers.finish()
    state = state_of(tmp_path)
    assert (state.rows, state.finished) == (9, True)
    assert offline_steps(tmp_path) == list(range(9))


def test_it_ends_with_a_killed_run(
    tmp_path: Path, offline_steps: Callable[[Path], list[int]]
) -> None:
    loggers = begin(tmp_path, "offline")
    log(loggers, range(4))
    process = loggers._loggers["wandb"]._process  # type: ignore[attr-defined]
    process.stdin.close()  # As the kernel does.
    assert process.wait(60) == 0 and offline_steps(tmp_path) == list(range(4))
    loggers.finish()


def test_the_environment_counts_where_no_key_is_set(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert start_state(run_dir, {"project": "key"}).project == "key"
    (tmp_path / "wandb.json").unlink()
    assert start_state(run_dir, {"project": None}).project == "mine"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers = begin(tmp_path / "run", None)
    log(loggers, range(9))
    loggers.finish()
    assert not (tmp_path / "run/wandb.json").exists()
    # What runs in this environment sends nothing to the server of its owner.
    with serving() as server:
        use(monkeypatch, server.env | {"WANDB_MODE": "offline"})
        loggers = begin(tmp_path / "offline", None)
        log(loggers, range(9))
        loggers.finish()
        assert state_of(tmp_path / "offline").mode == "offline" and not server.asked


def test_training_is_the_same_without_a_server(
    serving: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        use(monkeypatch, server.env)
    # Closed: it refuses from here on.
    limits = ["logger.wandb.init_timeout_s=3", "logger.wandb.finish_timeout_s=20"]
    assert main(["train", *_TINY, "name=plain"]) == 0
    assert main(["train", *_TINY, "name=wandb", "logger=wandb", *limits]) == 0
    assert "`lunaris wandb-sync runs/wandb` sends it" in capsys.readouterr().out
    plain, other = (read_rows(Path("runs", name, "metrics.jsonl")) for name in ("plain", "wandb"))
    kept = [
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
        for rows in (plain, other)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 7
    # A run that was trained without W&B can be sent too; without a server one message says no.
    assert main(["wandb-sync", "runs/plain", "runs/wandb", "--timeout", "8"]) == 1
    out, err = capsys.readouterr()
    assert "runs/plain: not sent (CommError: " in out and "runs/wandb: not sent" in out
    assert "W&B has not taken runs/plain, runs/wandb" in err and "Traceback" not in out + err
    with serving() as server:
        use(monkeypatch, server.env)
        assert main(["wandb-sync", "runs/plain", "--project", "late"]) == 0
        assert sorted(server.rows) == [0, 2, 4, 6, 8, 10, 12]
    shutil.rmtree("runs/plain")
    assert main(["wandb-sync", "runs/plain"]) == 2
    assert main(["wandb-sync", "runs/wandb", "--timeout", "0"]) == 2


def test_a_project_counts_once_wandb_has_taken_the_run(tmp_path: Path) -> None:
    """A mistyped entity can be corrected: W&B has not seen it."""
    run_dir = RunDir(tmp_path)
    first = start_state(run_dir, {"project": "p", "entity": "typo"})
    state = start_state(run_dir, {"project": "q", "entity": "me"})
    assert (state.id, state.project, state.entity) == (first.id, "q", "me")
    state.url = "https://wandb.example/me/q"
    write_json(tmp_path / STATE, asdict(state))
    assert start_state(run_dir, {"project": "r", "entity": "you"}) == state


@pytest.mark.parametrize("change", [{"id": 3}, {"rows": "many"}, {"url": []}, {"project": None}])
def test_a_state_of_other_types_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    state = asdict(start_state(RunDir(tmp_path), {"project": "p"}))
    write_json(tmp_path / STATE, state | change)
    assert read_state(RunDir(tmp_path)) is None


def test_a_stopped_run_does_not_wait(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with serving("hole") as server:
        use(monkeypatch, server.env)
        loggers = begin(tmp_path, None, last=100, init_timeout_s=600.0, finish_timeout_s=600.0)
        log(loggers, range(9))
        began = time.monotonic()
        loggers.finish()
        assert time.monotonic() - began < 30
    assert (
        f"(no answer in 5 s); `lunaris wandb-sync {tmp_path}` sends it" in capsys.readouterr().out
    )
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert not left.stdout
