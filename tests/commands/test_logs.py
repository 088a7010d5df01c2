"""`lunaris logs`: what a run's process wrote, in all attempts, until the run ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.runs import follow
from lunaris.runs.run_dir import RunDir


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # There is no SLURM.
    monkeypatch.setattr(follow, "_LOOK_S", 0.01)
    monkeypatch.setattr(follow, "_STATE_S", 0.02)
    monkeypatch.setattr(follow, "_JOB_S", 0.02)


@pytest.fixture
def run() -> Callable[..., Path]:
    """Return a function that makes the folder of a run with logs, by their names in `logs/`."""

    def make(logs: dict[str, str], **status: object) -> Path:
        path = Path("runs/one")
        (path / "logs/slurm").mkdir(parents=True)
        (path / "config.yaml").write_text("name: x\n")
        for name, text in logs.items():
            (path / "logs" / name).write_text(text)
        RunDir(path).write_status(**status)
        return path

    return make


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["logs", *argv]) == 0
    return capsys.readouterr().out


def test_the_log_of_each_rank_is_printed(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run({"rank_0.log": "first\nsecond\n", "rank_1.log": "other\n"}, state="done")
    assert printed(capsys, "runs/one") == "first\nsecond\n"
    assert printed(capsys, "runs/one", "--rank", "1") == "other\n"
    assert printed(capsys, "runs/one", "-f") == "first\nsecond\n"


def test_bytes_that_are_no_text_are_printed(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run({}, state="done")
    (path / "logs/rank_0.log").write_bytes(b"a\xff\xfeb\n")
    assert printed(capsys, "runs/one") == "a\ufffd\ufffdb\n"


@pytest.mark.parametrize("flag", [[], ["-f"]])
def test_why_slurm_ended_a_job_comes_last(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    words = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***\n"
    path = run({"rank_0.log": "step 1\n", "slurm/7_0_log.out": f"step 1\n{words}"})
    job_log = str(path / "logs/slurm/7_0_log.out")
    RunDir(path).write_status(state="running", job_id="7", job_log=job_log)
    assert printed(capsys, "runs/one", *flag) == f"step 1\n{words}"


@pytest.mark.parametrize("flag", [[], ["-f"]])
def test_a_run_that_failed_before_its_first_line_shows_its_jobs_in_order(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    path = run({"slurm/9_0_log.out": "no module\n", "slurm/10_0_log.out": "no disk\n"})
    for age, name in ((20, "9"), (10, "10")):
        at = time.time() - age
        os.utime(path / f"logs/slurm/{name}_0_log.out", (at, at))
    RunDir(path).write_status(state="failed", job_log=str(path / "logs/slurm/10_0_log.out"))
    assert printed(capsys, "runs/one", *flag) == "no module\nno disk\n"


def test_following_waits_for_a_queued_run_and_ends_with_it(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run({}, state="queued", job_id=f"local-{os.getpid()}")
    run_dir, log = RunDir(path), path / "logs/rank_0.log"

    def attempts() -> None:
        for attempt in ("first", "second"):
            time.sleep(0.1)
            run_dir.write_status(state="running")
            for i in range(3):
                with log.open("a") as file:
                    file.write(f"{attempt} {i}\n")
                time.sleep(0.03)
            if attempt == "first":
                run_dir.write_status(state="queued")  # The job is requeued.
        with log.open("a") as file:
            file.write("the last line\n")
        run_dir.write_status(state="done")

    thread = threading.Thread(target=attempts)
    thread.start()
    out = printed(capsys, "runs/one", "-f")
    thread.join()
    lines = [f"{attempt} {i}" for attempt in ("first", "second") for i in range(3)]
    assert out.splitlines() == [*lines, "the last line"]


def test_what_is_no_run_is_refused(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run({"rank_0.log": "x\n", "rank_3.log": "y\n"}, state="done")
    Path("empty").mkdir()
    rows = [{"name": f"seed={s}", "overrides": [], "dir": f"seed={s}"} for s in range(4)]
    Path("sweep").mkdir()
    write_json(Path("sweep/manifest.json"), {"points": rows})
    for argv, words in (
        (["nowhere"], "nowhere: not a run's folder"),
        (["empty"], "empty: not a run's folder"),
        (["sweep"], "one of its points: sweep/seed=0, sweep/seed=1, sweep/seed=2, …"),
        (["runs/one", "--rank", "1"], "--rank 1: runs/one has no log of this process"),
    ):
        assert main(["logs", *argv]) == 2
        assert words in capsys.readouterr().err


def test_a_run_without_any_log_says_how_it_stands(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run({}, state="queued", job_id=f"local-{os.getpid()}")
    assert main(["logs", "runs/one"]) == 2
    assert "has no log yet; the run is queued" in capsys.readouterr().err
