"""Jobs that wait for the jobs of other runs, without a SLURM: dependencies, refusals, remarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.continuation.checks import check_start
from lunaris.errors import UserError
from lunaris.launch import awaited
from lunaris.launch.slurm import Slurm, _mark_queued
from lunaris.launch.snapshot import Snapshot
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import resolve_states

Queue = Callable[[str], None]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Return a function that puts a `squeue` in place, which prints what it is given."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(text: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, said in (("squeue", f"echo '{text}'"), ("sacct", "exit 1")):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{said}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return put


def make_run(path: str, **status: object) -> None:
    Path(path).mkdir(parents=True)
    (Path(path) / "config.yaml").write_text("name: x\n")
    RunDir(path).write_status(**status)


def script(**keys: Any) -> str:
    return Slurm(**keys).script("run", Path("/logs/a/b"), Path("/code"))


def test_a_job_waits_for_the_jobs_of_runs_and_sweeps_that_are_not_done(queue: Queue) -> None:
    queue("7|RUNNING|None\n9_0|PENDING|None\n9_1|RUNNING|None")
    make_run("a", state="running", job_id="7")
    make_run("b", state="done", job_id="8")
    Path("s").mkdir()
    rows = [{"name": str(i), "overrides": [], "dir": str(i)} for i in range(3)]
    write_json(Path("s/manifest.json"), {"points": rows})
    for i, state in enumerate(("queued", "running", "done")):
        make_run(f"s/{i}", state=state, job_id=f"9_{i}")
    assert "dependency" not in script(after="b") and "kill-on-inv" not in script(after=["b"])
    shown = script(after=["a", "b", "s", "a"], dependency="singleton")
    assert "#SBATCH --dependency=singleton,afterok:7:9_0:9_1\n" in shown
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in shown


def test_removed_points_and_shards_made_without_a_job_are_not_awaited(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue("9_1|RUNNING|None")
    Path("s").mkdir()
    rows = [{"name": str(i), "overrides": [], "dir": str(i)} for i in range(2)]
    write_json(Path("s/manifest.json"), {"points": rows, "removed": ["0"]})
    make_run("s/0", state="cancelled", job_id="9_0", cancelled=1.0)
    make_run("s/1", state="running", job_id="9_1")
    assert "#SBATCH --dependency=afterok:9_1\n" in script(after="s")
    Path("shards").mkdir()
    monkeypatch.setattr(awaited.manifests, "read", lambda path: path.name == "shards" or None)
    assert "dependency" not in script(after="shards")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"state": "failed", "job_id": "3", "last_error": "Boom"}, r"a is failed \(Boom\); resume"),
        ({"state": "queued"}, "a is missing; resume it first"),
        ({"state": "running", "job_id": "local-1"}, "a is running on a machine, not as a job"),
        (None, "launch.after=a: /.*/a is not a run's folder, not a sweep's, and none that jobs"),
    ],
)
def test_what_cannot_be_waited_for_is_refused_and_nothing_is_written(
    queue: Queue, tiny: Callable[..., Any], status: dict[str, Any] | None, message: str
) -> None:
    queue("3|FAILED|None")
    if status is not None:
        make_run("a", **status)
    cfg = tiny("launch=slurm", "launch.after=a", "launch.dry_run=true")
    with pytest.raises(UserError, match=message):
        Slurm.of(cfg).submit(cfg, "test", [])
    assert not Path(cfg.out_dir).exists()


def test_while_slurm_does_not_answer_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("a", state="running", job_id="7")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="a: whether job 7 still waits or runs is unknown"):
        script(after="a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.after=7"], "launch.after=7: must be the folder of a run"),
        (["launch.after=[a,null]"], "must be the folder of a run"),
        (["launch.after=a", 'launch.dependency="afterok:1?afterok:2"'], "joins dependencies by"),
        (["launch.chain=2", 'launch.dependency="afterok:1?afterok:2"'], "not with launch.chain"),
        (["launch.after=a", "launch.cluster=local"], "launch.after=a: needs SLURM"),
    ],
)
def test_a_wrong_value_is_refused(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "data=synthetic", "launch=slurm", *overrides]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not os.listdir()


def test_weights_that_an_awaited_run_has_yet_to_save_are_checked_by_the_job(
    tiny: Callable[..., Any],
) -> None:
    make_run("a", state="queued", job_id="7")
    for weights in ("a", "a/model.pt", "a/checkpoints/step_00000008"):
        check_start(tiny("launch=slurm", "launch.after=a", f"init_from={weights}"))
        with pytest.raises(UserError, match="init_from="):
            check_start(tiny("launch=slurm", f"init_from={weights}"))
    with pytest.raises(UserError, match="init_from=b: no such file"):
        check_start(tiny("launch=slurm", "launch.after=a", "init_from=b"))
    # What is there already is checked now.
    Path("a/model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="not a file of weights"):
        check_start(tiny("launch=slurm", "launch.after=a", "init_from=a/model.pt"))


@pytest.mark.parametrize(("state", "said"), [("failed", "failed"), ("stopped", "was stopped")])
def test_a_job_that_waited_in_vain_names_the_run_that_did_not_end_well(
    queue: Queue, state: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also once SLURM has forgotten the job, and where the folder of runs has been moved."""
    make_run("x/runs/a", state=state, job_id="7")
    make_run("x/runs/b", state="queued")
    _mark_queued(RunDir("x/runs/b"), Snapshot(Path("code")), ["x/runs/a"])
    RunDir("x/runs/b").write_status(job_id="8")
    Path("x").rename("y")
    for answer in ("8|CANCELLED|DependencyNeverSatisfied", ""):
        queue(answer)
        (found,) = resolve_states([Path("y/runs/b")])
        assert found.state == "cancelled"
        assert found.remark == f"y/runs/a, for which it waited, {said}"
    assert main(["runs", "y/runs/b"]) == 0
    assert f"b: cancelled: y/runs/a, for which it waited, {said}" in capsys.readouterr().out
    RunDir("y/runs/a").write_status(state="done")
    assert resolve_states([Path("y/runs/b")])[0].state == "missing"


def test_a_run_waits_for_the_preparation_of_its_data(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    queue("7_0|RUNNING|None\n7_1|PENDING|None\n8|PENDING|Dependency")
    Path("shards/x").mkdir(parents=True)
    Path("shards/x/prepare.yaml").touch()
    RunDir("shards/x").write_status(state="running", job_id="8", task_ids=["7_0", "7_1"])
    train = ["train", "data=shards", "data.dir=shards/x", "launch=slurm", "launch.dry_run=true"]
    assert main([*train, "launch.after=shards/x"]) == 0
    assert "#SBATCH --dependency=afterok:8\n" in capsys.readouterr().out
    # Without the wait, the data must be there.
    assert main(train) == 2
    assert "shards/x" in capsys.readouterr().err
    RunDir("shards/x").write_status(state="failed", last_error="task 1: no")
    queue("7_0|COMPLETED|None\n7_1|FAILED|None\n8|CANCELLED|None")
    assert main([*train, "launch.after=shards/x"]) == 2
    said = "shards/x is failed (task 1: no); send it again first"
    assert said in capsys.readouterr().err
