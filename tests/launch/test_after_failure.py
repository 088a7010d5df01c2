"""The end of a job whose tasks failed: what is counted and requeued, and what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.distributed.heartbeat import record_failure
from lunaris.errors import RunFailed, UserError
from lunaris.launch import after_failure, requeue, snapshot
from lunaris.launch.slurm import Slurm
from lunaris.runs.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose first attempt, as job 7, has failed."""
    made = RunDir(tmp_path / "run")
    made.logs.mkdir(parents=True)
    (made.path / "job.out").write_text("Starting with JobEnvironment(job_id=7)\n")
    (tmp_path / "file").write_text(str(made.path))
    made.write_status(state="running", job_id="7", job_log=str(made.path / "job.out"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return made


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that puts a `scontrol` in place; it returns the file of its calls."""

    def put(state: str = "RUNNING", code: int = 0) -> Path:
        client, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
        client.parent.mkdir()
        client.write_text(
            f"#!/bin/sh\n[ $1 = show ] && echo JobState={state} && exit\n"
            f"echo $@ >> {calls}\n[ {code} = 0 ] || {{ echo refused >&2; exit {code}; }}\n"
        )
        client.chmod(0o755)
        calls.touch()
        monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
        return calls

    return put


def failed(run_dir: RunDir, limit: int = 1) -> dict[str, Any]:
    after_failure.main([str(run_dir.path.parent / "file"), "137", str(limit)])
    return run_dir.read_status()


def fail_with(run_dir: RunDir, rank: int, cause: Exception, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCHELASTIC_ERROR_FILE", str(run_dir.logs / f".error_{rank}.json"))
    record_failure(cause)


def test_a_failure_is_counted_and_requeued_up_to_the_limit(
    run_dir: RunDir, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scontrol()
    fail_with(run_dir, 1, RunFailed("a full disk"), monkeypatch)
    run_dir.write_status(timeouts=2)
    status = failed(run_dir)
    assert (status["state"], status["failures"], status["timeouts"]) == ("queued", 1, 2)
    assert status["last_failure"] == "rank 1: a full disk"
    run_dir.write_status(state="failed")
    status = failed(run_dir)
    assert (status["state"], status["failures"]) == ("failed", 2)
    assert calls.read_text() == "requeue 7\n"


def test_a_wrong_input_is_not_tried_again_also_where_other_ranks_failed_of_it(
    run_dir: RunDir, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scontrol()
    fail_with(run_dir, 1, UserError("init_from=x: no such file"), monkeypatch)
    fail_with(run_dir, 0, RuntimeError("Connection closed by peer"), monkeypatch)
    assert "failures" not in failed(run_dir) and not calls.read_text()


@pytest.mark.parametrize("line", ["oom_kill event in StepId=7.0", "Out Of Memory"])
def test_a_lack_of_memory_is_not_tried_again(run_dir: RunDir, scontrol: Any, line: str) -> None:
    calls = scontrol()
    log = run_dir.path / "job.out"
    log.write_text(f"{log.read_text()}srun: error: n1: task 0: Out Of Memory\n{line}\n")
    assert "failures" not in failed(run_dir) and not calls.read_text()


@pytest.mark.parametrize(
    ("written", "job"),
    [("stopped", "RUNNING"), ("done", "RUNNING"), ("running", "COMPLETING")],
)
def test_what_was_stopped_is_done_or_is_ended_by_slurm_is_left_alone(
    run_dir: RunDir, scontrol: Any, written: str, job: str
) -> None:
    calls = scontrol(state=job)
    run_dir.write_status(state=written)
    before = run_dir.read_status()
    assert failed(run_dir) == before and not calls.read_text()


def test_a_refused_requeue_is_reported(run_dir: RunDir, scontrol: Any) -> None:
    scontrol(code=1)
    run_dir.write_status(state="failed", last_error="Boom")
    status = failed(run_dir)
    assert (status["state"], status["failures"]) == ("failed", 1)
    assert status["last_error"] == "Boom; SLURM refuses to requeue: refused"


def test_the_script_calls_it_with_the_frozen_code_by_a_bare_python(
    run_dir: RunDir, scontrol: Any, tmp_path: Path
) -> None:
    """As on a host whose python has no packages; the job ends with the exit code of its tasks."""
    calls = scontrol()
    code = snapshot.take(tmp_path / "code").path
    script = Slurm(max_failures=2).script("run", tmp_path, code)
    python, _, end = script.partition("# command\n")
    named = f'printf %s {run_dir.path} > "$LUNARIS_RUN_FILE"; (exit 9)'
    lines = [named if line.startswith("srun ") else line for line in end.splitlines()]
    done = subprocess.run(
        ["bash", "-c", "\n".join([python, *lines])], capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    assert "requeued after failure 1 of 2: exit code 9" in done.stdout
    assert calls.read_text() == "requeue 7\n" and not list(tmp_path.glob(".run_*"))
    # Nothing of this checkout or of its environment was imported.
    bare = f"import sys; sys.path[:0] = [{str(code)!r}]; import lunaris.launch.after_failure"
    bare += "; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", bare], capture_output=True, text=True)
    loaded = set(eval(done.stdout))
    assert loaded - {"lunaris"} <= set(sys.stdlib_module_names) | {"__main__"}


def test_a_job_that_may_not_be_requeued_cannot_be_tried_again() -> None:
    with pytest.raises(UserError, match=r"launch.max_failures=1: needs launch.chain above 1 or"):
        Slurm(max_failures=1, additional_parameters={"requeue": False})


@pytest.mark.parametrize(
    ("limit", "job_id", "state", "cancelled"),
    [(1, "7", "queued", []), (0, "7", "running", ["8"]), (1, "8", "running", [])],
)
def test_of_a_chain_the_next_job_continues_or_all_are_given_up(
    run_dir: RunDir, scontrol: Any, monkeypatch: pytest.MonkeyPatch,
    limit: int, job_id: str, state: str, cancelled: list[str],
) -> None:  # fmt: skip
    calls = scontrol()
    asked: list[str] = []
    monkeypatch.setattr(after_failure, "cancel_jobs", asked.extend)
    run_dir.write_status(chain=["7", "8"], job_id=job_id)
    status = failed(run_dir, limit)
    assert (status["state"], status["failures"], asked) == (state, 1, cancelled)
    assert not calls.read_text()


@pytest.mark.parametrize("taken_at", [1, 3])
def test_a_job_is_requeued_without_the_nodes_that_the_preflight_names(
    run_dir: RunDir, scontrol: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken_at: int
) -> None:
    """SLURM takes other nodes once it has ended the job; until then the job is held."""
    calls = scontrol(state="'RUNNING ExcNodeList=n[8-9]'")
    client = tmp_path / "bin" / "scontrol"
    refuse = f"[ $1 = update ] && [ $(grep -c update {calls}) -lt {taken_at} ] && exit 1\n"
    client.write_text(client.read_text() + refuse + "exit 0\n")
    monkeypatch.setattr(requeue, "_BETWEEN_S", 0.0)
    monkeypatch.setattr(requeue.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    said = "a matrix product at 1 TFLOP/s"
    run_dir.write_status(state="failed", bad_nodes={"n2": said})
    status = failed(run_dir, limit=0)
    assert (status["state"], status["bad_nodes"]) == ("queued", {})
    assert status["excluded"] == {"n2": said}
    assert "failures" not in status
    without = "update jobid=7 excnodelist=n[8-9],n2"
    expected = ["requeuehold 7", *[without] * taken_at, "release 7"]
    assert calls.read_text().splitlines() == expected


def test_a_run_tries_other_nodes_as_often_as_it_has_nodes(
    run_dir: RunDir, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scontrol()
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    run_dir.write_status(
        state="failed",
        bad_nodes={"n4": "slow"},
        excluded={"n2": "slow", "n3": "slow"},
        preflights=2,
    )
    status = failed(run_dir)
    assert (status["state"], sorted(status["excluded"])) == ("failed", ["n2", "n3", "n4"])
    assert not calls.read_text()


def test_the_next_jobs_of_a_chain_get_other_nodes(
    run_dir: RunDir, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scontrol()
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    run_dir.write_status(state="failed", bad_nodes={"n2": "slow"}, chain=["7", "8", "9"])
    assert failed(run_dir)["state"] == "queued"
    expected = [f"update jobid={job_id} excnodelist=n2" for job_id in (8, 9)]
    assert calls.read_text().splitlines() == expected
