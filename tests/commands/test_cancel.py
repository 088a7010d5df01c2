"""`lunaris cancel`: the jobs of a run or a sweep, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.commands.train import submit
from lunaris.errors import UserError
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import refuse_active

FAKE = "#!/bin/sh\n{said}\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """Return a function that puts a queue and a `scancel` in place; it returns the calls' file."""

    def put(queue: str, code: int = 0) -> Path:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        said = {"squeue": f"echo '{queue}'", "scancel": f"echo $@ >> {calls}; exit {code}"}
        for name, text in said.items():
            (folder / name).write_text(FAKE.format(said=text))
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return calls

    return put


def make_run(path: Path, **status: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    RunDir(path).write_status(**status)
    return path


def test_only_jobs_that_wait_or_run_are_cancelled(cluster: Callable[..., Path]) -> None:
    calls = cluster("7_0|RUNNING|None\n7_1|PENDING|None")
    rows = [{"name": str(i), "overrides": [], "dir": str(i)} for i in range(3)]
    Path("sweep").mkdir()
    write_json(Path("sweep/manifest.json"), {"points": rows})
    for i, state in enumerate(("running", "queued", "done")):
        make_run(Path("sweep") / str(i), state=state, job_id=f"7_{i}")
    assert main(["cancel", "sweep"]) == 0
    assert calls.read_text().split() == ["--quiet", "7_0", "7_1"]
    marked = ["cancelled" in RunDir(Path("sweep") / str(i)).read_status() for i in range(3)]
    assert marked == [True, True, False]


def test_of_a_sweep_the_jobs_of_removed_points_alone_are_cancelled(
    cluster: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = cluster("7_0|RUNNING|None\n7_1|PENDING|None")
    rows = [{"name": str(i), "overrides": [], "dir": str(i)} for i in range(2)]
    Path("sweep").mkdir()
    write_json(Path("sweep/manifest.json"), {"points": rows, "removed": ["1"]})
    for i, state in enumerate(("running", "queued")):
        make_run(Path("sweep") / str(i), state=state, job_id=f"7_{i}")
    assert main(["cancel", "sweep", "--removed"]) == 0
    assert calls.read_text().split() == ["--quiet", "7_1"]
    assert "cancelled job 7_1: sweep/1" in capsys.readouterr().out
    make_run(Path("run"), state="done")
    assert main(["cancel", "run", "--removed"]) == 2
    assert "--removed: goes with the folder of a sweep" in capsys.readouterr().err


def test_a_refusal_is_told_and_nothing_is_marked(
    cluster: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster("3|RUNNING|None", 1)
    path = make_run(Path("run"), state="running", job_id="3")
    assert main(["cancel", "run"]) == 2
    assert "refuses to cancel" in capsys.readouterr().err
    assert RunDir(path).read_status()["cancelled"] is None


def test_the_command_that_is_printed_quotes_the_folder(
    cluster: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster("3|RUNNING|None")
    make_run(Path("my run"), state="running", job_id="3")
    with pytest.raises(UserError, match="`lunaris cancel 'my run'` cancels it"):
        refuse_active(Path("my run"))
    assert main(["cancel", "my run"]) == 0
    assert "`lunaris resume 'my run'`" in capsys.readouterr().out


def test_without_a_job_there_is_nothing_to_cancel(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("run"), state="done")
    assert main(["cancel", "run"]) == 0
    assert "no job to cancel" in capsys.readouterr().out


def test_a_folder_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", "."]) == 2
    assert "not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_nothing_is_done_while_slurm_does_not_answer(
    command: str,
    tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = create(tiny("launch=slurm"), "lunaris train", [])
    run_dir.write_status(state="queued", job_id="3")
    before = run_dir.read_status()
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([command, str(run_dir.path)]) == 2
    assert "whether job 3 still waits or runs is unknown" in capsys.readouterr().err
    assert run_dir.read_status() == before


@pytest.mark.parametrize("launch", ["local", "slurm"])
def test_a_run_whose_job_may_still_run_is_not_trained(
    launch: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(f"launch={launch}")
    run_dir = create(cfg, "lunaris train", [])
    run_dir.write_status(state="queued", job_id="3")
    before = run_dir.read_status()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"job 3 .* unknown, .*squeue is not on the PATH"):
        submit(cfg, "lunaris train", [])
    assert run_dir.read_status() == before
