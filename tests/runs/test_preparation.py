"""Folders of shards that jobs prepare: what their jobs are together, in `runs` and in `cancel`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.runs.preparation import Progress, bundle_name, progress
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import UNREACHED, JobState
from lunaris.runs.status import resolve_states

IDS = ["7_0", "7_1", "7_2", "8"]


def folder(path: str, **status: object) -> Path:
    made = Path(path)
    made.mkdir(parents=True)
    (made / "prepare.yaml").write_text("name: x\n")
    known = {"state": "running", "job_id": IDS[-1], "task_ids": IDS[:-1], "bytes": 4000}
    RunDir(made).write_status(**(known | status))
    return made


@pytest.mark.parametrize(
    ("states", "written", "expected"),
    [
        ("PENDING PENDING PENDING PENDING", {"state": "queued"}, ("queued", "Priority")),
        ("RUNNING PENDING PENDING PENDING", {}, ("running", "")),
        ("COMPLETED PENDING COMPLETED PENDING", {}, ("queued", "Priority")),
        ("COMPLETED COMPLETED COMPLETED PENDING", {}, ("queued", "Priority")),
        ("COMPLETED COMPLETED COMPLETED RUNNING", {}, ("running", "")),
        ("COMPLETED COMPLETED COMPLETED COMPLETED", {"state": "done"}, ("done", "")),
        # One task has failed, and another one works on.
        ("FAILED RUNNING COMPLETED PENDING", {"state": "failed"}, ("running", "")),
        (
            "COMPLETED FAILED COMPLETED CANCELLED",
            {"state": "failed", "last_error": "task 1: no"},
            ("failed", "task 1: no"),
        ),
        (
            "COMPLETED COMPLETED OUT_OF_MEMORY CANCELLED",
            {},
            ("out_of_memory", "task 2: OUT_OF_MEMORY"),
        ),
        ("CANCELLED NODE_FAIL COMPLETED CANCELLED", {}, ("node_fail", "task 1: NODE_FAIL")),
        ("CANCELLED CANCELLED - CANCELLED", {"cancelled": 1.0}, ("cancelled", "")),
        ("COMPLETED COMPLETED COMPLETED TIMEOUT", {}, ("timeout", "")),
        ("- - - -", {"state": "failed", "last_error": "merging: no"}, ("failed", "merging: no")),
        (f"COMPLETED {UNREACHED} COMPLETED PENDING", {}, ("unknown", "")),
    ],
)
def test_the_jobs_of_a_preparation_are_one_state(
    monkeypatch: pytest.MonkeyPatch,
    states: str,
    written: dict[str, object],
    expected: tuple[str, str],
) -> None:
    jobs = {
        i: JobState(name, "Priority" if name == "PENDING" else "")
        for i, name in zip(IDS, states.split(), strict=True)
        if name != "-"
    }
    asked: list[str] = []

    def ask(ids: object) -> dict[str, JobState]:
        asked.extend(ids)  # type: ignore[call-overload]
        return jobs

    monkeypatch.setattr("lunaris.runs.status.ask_slurm", ask)
    (state,) = resolve_states([folder("shards/x", **written)])
    assert (state.state, state.remark) == expected
    assert asked == ([] if written.get("state") == "done" else IDS)


def test_a_task_that_was_killed_is_named_with_its_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("COMPLETED", "FAILED", "COMPLETED", "CANCELLED")
    jobs = {i: JobState(name) for i, name in zip(IDS, names, strict=True)}
    monkeypatch.setattr("lunaris.runs.status.ask_slurm", lambda ids: jobs)
    log = folder("shards/x", job_log="8.out") / "logs" / "slurm" / "7_1_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("task 1 of 3: encoded 3 MB\nsrun: error: node1: task 0: Killed\n")
    assert main(["runs", "shards/x"]) == 0
    shown = capsys.readouterr().out
    assert "  x: failed: task 1: killed by SIGKILL, as the kernel does when" in shown
    assert f"    log: {log}" in shown


def test_progress_is_read_from_the_names_of_bundles_and_the_note() -> None:
    made = folder("shards/x")
    status = RunDir(made).read_status()
    assert progress(made, status) == Progress(0, 0, 4000)
    bundles = made / ".prepare" / "encoded"
    bundles.mkdir(parents=True)
    for start, size in ((0, 500), (500, 700)):
        (bundles / bundle_name(0, 3, start, size)).touch()
    (bundles / "0-3.bundle").touch()
    assert progress(made, status) == Progress(1200, 0, 4000)
    write_json(made / ".prepare" / "note.json", {"input_bytes": 1000})
    assert progress(made, status) == Progress(2200, 1000, 4000)
    assert progress(made, status | {"bytes": 2000}) == Progress(2000, 1000, 2000)
    assert progress(made, status | {"bytes": 0}) == Progress(2200, 1000, 0)
    assert progress(made, status | {"state": "done"}) == Progress(4000, 4000, 4000)


def test_a_preparation_is_a_row_of_its_own_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder("shards/done", state="done")
    # The process of init, which lives as long as the machine runs.
    made = folder("shards/mine", job_id="local-1", task_ids=[], last_error="task 1: no such key")
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/config.yaml").write_text("name: one\n")
    (made / ".prepare" / "encoded").mkdir(parents=True)
    (made / ".prepare" / "encoded" / bundle_name(0, 0, 0, 1000)).touch()
    assert main(["runs"]) == 0
    runs, prepared = capsys.readouterr().out.split("\n\n")
    assert "one" in runs and "mine" not in runs
    lines = prepared.splitlines()
    assert lines[0].split() == ["shards", "state", "encoded", "merged", "input", "job"]
    assert lines[1].split() == ["done", "done", "100", "%", "100", "%", "0.0", "MB", "8"]
    assert lines[2].split() == ["mine", "running", "25", "%", "0", "%", "0.0", "MB", "local-1"]
    assert lines[3] == "  mine: running: task 1: no such key"
    assert main(["runs", "shards/mine", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["prepared"] == {"encoded": 1000, "merged": 0, "total": 4000}
    # Other commands take runs only.
    assert main(["report", "shards/mine"]) == 2


def test_all_jobs_of_a_preparation_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    queue = "\n".join(f"{i}|PENDING|None" for i in IDS)
    for name, said in (("squeue", f"echo '{queue}'"), ("scancel", f"echo $@ > {tmp_path}/calls")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    made = folder("shards/mine")
    assert main(["cancel", "shards/mine"]) == 0
    assert (tmp_path / "calls").read_text().split() == ["--quiet", *IDS]
    assert "cancelled jobs 7_0, 7_1, 7_2, 8: shards/mine" in capsys.readouterr().out
    assert RunDir(made).read_status()["cancelled"]
