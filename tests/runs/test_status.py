"""The states of runs, from their files and from SLURM."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.atomic_files import write_json
from lunaris.runs import slurm_client
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import (
    LOCAL,
    UNREACHED,
    JobState,
    ask_slurm,
    cancel_jobs,
    current_job_id,
    is_process,
)
from lunaris.runs.status import (
    has_trained,
    last_line,
    logs_of,
    resolve_state,
    resolve_states,
)

Clients = Callable[..., None]


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """Return a function that puts clients of SLURM in place, which print what it is given."""

    def put(**outputs: str | None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name in ("squeue", "sacct"):
            text = outputs.get(name)
            client = folder / name
            # None: without accounting, or when SLURM has forgotten the job.
            forgotten = "echo Invalid job id specified >&2; exit 1"
            shown = forgotten if text is None else f"cat <<'END'\n{text}\nEND"
            client.write_text(f"#!/bin/sh\n{shown}\n")
            client.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return put


def run(path: Path, **status: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    RunDir(path).write_status(**status)
    return path


@pytest.mark.parametrize(
    ("written", "job", "expected"),
    [
        ("done", None, "done"),
        ("done", "COMPLETING", "done"),
        ("queued", "PENDING", "queued"),
        ("queued", "CONFIGURING", "queued"),
        ("queued", "RUNNING", "running"),
        ("running", "RUNNING", "running"),
        ("stopped", "PENDING", "queued"),
        ("failed", "PENDING", "queued"),
        ("failed", "FAILED", "failed"),
        ("failed", "COMPLETING", "failed"),
        ("failed", "NODE_FAIL", "node_fail"),
        ("running", "NODE_FAIL", "node_fail"),
        ("running", "OUT_OF_MEMORY", "out_of_memory"),
        ("running", "TIMEOUT", "timeout"),
        ("running", "DEADLINE", "timeout"),
        ("queued", "DEADLINE", "timeout"),
        ("running", "BOOT_FAIL", "node_fail"),
        ("running", "REVOKED", "cancelled"),
        ("running", "A_STATE_OF_TOMORROW", "failed"),
        ("stopped", "TIMEOUT", "timeout"),
        ("stopped", "COMPLETING", "stopped"),
        ("stopped", "COMPLETED", "stopped"),
        ("running", "COMPLETING", "running"),
        ("running", "SUSPENDED", "running"),
        ("running", "STAGE_OUT", "running"),
        ("stopped", "REQUEUED", "queued"),
        ("stopped", "REQUEUE_HOLD", "queued"),
        ("running", "PREEMPTED", "preempted"),
        ("stopped", "CANCELLED", "cancelled"),
        ("queued", "CANCELLED", "cancelled"),
        ("queued", "FAILED", "failed"),
        ("running", "COMPLETED", "failed"),
        ("running", None, "failed"),
        ("queued", None, "missing"),
        ("stopped", None, "stopped"),
    ],
)
def test_a_state_comes_from_the_run_and_from_slurm(
    tmp_path: Path, written: str, job: str | None, expected: str
) -> None:
    status = {"state": written, "job_id": "7"}
    assert resolve_state(tmp_path, status, JobState(job) if job else None).state == expected


@pytest.mark.parametrize(
    ("job", "error", "expected"),
    [
        ("COMPLETING", None, "queued"),
        ("PREEMPTED", None, "queued"),
        ("COMPLETING", "requeue refused", "preempted"),
        ("PREEMPTED", "requeue refused", "preempted"),
        ("CANCELLED", None, "cancelled"),
    ],
)
def test_a_job_that_slurm_requeues_has_not_ended(
    tmp_path: Path, job: str, error: str | None, expected: str
) -> None:
    status = {"state": "stopped", "stop_cause": "preempted", "last_error": error, "job_id": "7"}
    assert resolve_state(tmp_path, status, JobState(job)).state == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("*** JOB 3 ON n1 CANCELLED AT 2026-11-23T03:35:35 DUE TO TIME LIMIT ***", "timeout"),
        ("*** JOB 3 ON n1 CANCELLED AT 2026-11-23T03:35:35 DUE TO NODE FAILURE ***", "node_fail"),
        ("*** STEP 3.0 ON n1 CANCELLED AT 2026-11-23T03:35:35 DUE TO PREEMPTION ***", "preempted"),
        ("*** JOB 3 ON n1 CANCELLED AT 2026-11-23T03:35:35 ***", "cancelled"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=3.0.", "out_of_memory"),
        ("something else", "failed"),
    ],
)
def test_where_slurm_has_forgotten_the_job_its_log_tells(
    tmp_path: Path, line: str, expected: str
) -> None:
    log = tmp_path / "3_0_log.out"
    log.write_text(f"submitit INFO - Starting with JobEnvironment(job_id=3)\n{line}\n")
    status = {"state": "running", "job_id": "3", "job_log": str(log)}
    assert resolve_state(tmp_path, status, None).state == expected


def test_what_ended_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    log.write_text("DUE TO PREEMPTION\nStarting with JobEnvironment(x)\nstep 1\n")
    status = {"state": "running", "job_id": "3", "job_log": str(log)}
    assert resolve_state(tmp_path, status, None).state == "failed"


def test_the_queue_is_asked_first_then_the_accounting(clients: Clients) -> None:
    clients(squeue="1|RUNNING|None\n9_0|PENDING|Resources", sacct="1|FAILED|1:0\n2|TIMEOUT|0:0")
    found = ask_slurm(["1", "2", "9_0", "5"])
    assert found == {
        "1": JobState("RUNNING"),
        "2": JobState("TIMEOUT"),
        "9_0": JobState("PENDING", "Resources"),
    }


def test_without_queue_and_accounting_nothing_is_known(clients: Clients) -> None:
    clients()
    assert ask_slurm(["1"]) == {}


def silent(folder: Path, said: str) -> Path:
    """Put a `squeue` that says `said` and no answer in place; return the file of its calls."""
    folder.mkdir()
    calls = folder / "calls"
    (folder / "squeue").write_text(f"#!/bin/sh\necho x >> {calls}\n{said}\n")
    (folder / "squeue").chmod(0o755)
    return calls


def test_a_queue_that_refuses_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits_s = slurm_client._WAITS_S
    assert 0 < sum(waits_s) < 5
    monkeypatch.setattr(slurm_client, "_WAITS_S", (0.0,) * len(waits_s))
    calls = silent(tmp_path / "bin", "echo 'error: Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    said = "squeue: error: Unable to contact slurm controller"
    assert ask_slurm(["1", "2"]) == {i: JobState(UNREACHED, said) for i in ("1", "2")}
    assert len(calls.read_text().split()) == 1 + len(waits_s)
    silent(tmp_path / "next", f"[ $(wc -l < {tmp_path / 'next/calls'}) = 2 ] && echo '1|RUNNING|'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'next'}:/usr/bin:/bin")
    assert ask_slurm(["1"]) == {"1": JobState("RUNNING")}


def test_a_queue_that_hangs_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = silent(tmp_path / "bin", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_client, "_TIMEOUT_S", 1)
    assert ask_slurm(["1"]) == {"1": JobState(UNREACHED, "squeue did not answer in 1 s")}
    assert calls.read_text() == "x\n"


def test_what_the_accounting_knows_counts_where_the_queue_is_silent(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clients(sacct="1|TIMEOUT|0:0")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(slurm_client, "_WAITS_S", ())
    found = ask_slurm(["1", "2"])
    assert {i: job.name for i, job in found.items()} == {"1": "TIMEOUT", "2": UNREACHED}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"state": "queued"}, "unknown"),
        ({"state": "running"}, "unknown"),
        ({"state": "stopped", "stop_cause": "preempted"}, "unknown"),
        ({"state": "stopped"}, "stopped"),
        ({"state": "failed"}, "failed"),
        ({"state": "queued", "cancelled": 1.0}, "cancelled"),
        ({"state": "done"}, "done"),
    ],
)
def test_without_slurm_s_clients_a_job_may_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: dict[str, object], expected: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (state,) = resolve_states([run(tmp_path / "run", job_id="7", **status)])
    assert state.state == expected
    assert state.ended == (expected != "unknown")
    assert not state.ended == (state.remark == "squeue is not on the PATH")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("DUE TO TIME LIMIT", "timeout"), ("DUE TO NODE FAILURE", "unknown")],
)
def test_where_slurm_is_silent_the_log_tells_what_is_final(
    tmp_path: Path, line: str, expected: str
) -> None:
    log = tmp_path / "log.out"
    log.write_text(line)
    status = {"state": "running", "job_id": "3", "job_log": str(log)}
    assert resolve_state(tmp_path, status, JobState(UNREACHED, "x")).state == expected


@pytest.mark.parametrize("shown", ["CANCELLED", "PREEMPTED"])
def test_a_job_that_is_being_requeued_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    answers = iter([f"3|{shown}|None", "3|PENDING|BeginTime"])

    def client(*command: str) -> subprocess.CompletedProcess[str]:
        answer = next(answers) if command[0] == "squeue" else ""
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(slurm_client, "_client", client)
    monkeypatch.setattr(slurm_client, "_REQUEUES_S", (0.0, 0.0))
    assert ask_slurm(["3"]) == {"3": JobState("PENDING", "BeginTime")}
    # It stays so where nobody requeues it, and a reason leaves no doubt.
    answers = iter([f"3|{shown}|None"] * 3 + [f"3|{shown}|DependencyNeverSatisfied"])
    assert ask_slurm(["3"])["3"].name == shown
    assert ask_slurm(["3"])["3"].name == shown


def test_records_of_many_elements_are_read(clients: Clients) -> None:
    clients(squeue="7_[1-2,5%4]|PENDING|JobArrayTaskLimit\n8|CANCELLED|None")
    found = ask_slurm(["7_1", "7_2", "7_3", "7_5", "8_4"])
    assert {i: s.name for i, s in found.items()} == {
        "7_1": "PENDING",
        "7_2": "PENDING",
        "7_5": "PENDING",
        "8_4": "CANCELLED",
    }


@pytest.mark.parametrize(
    ("queue", "written", "state"),
    [
        ("1|COMPLETED|\n2|RUNNING|\n3|PENDING|Dependency", "running", "running"),
        ("1|COMPLETING|\n2|PENDING|Dependency\n3|PENDING|Dependency", "queued", "queued"),
        ("1|FAILED|\n2|PENDING|BeginTime\n3|PENDING|Dependency", "running", "queued"),
        ("1|FAILED|\n2|CANCELLED|\n3|CANCELLED|", "failed", "failed"),
        ("1|CANCELLED|\n2|CANCELLED|\n3|CANCELLED|", "queued", "cancelled"),
    ],
)
def test_of_a_chain_the_job_that_runs_or_waits_counts(
    tmp_path: Path, clients: Clients, queue: str, written: str, state: str
) -> None:
    clients(squeue=queue)
    path = run(tmp_path / "run", state=written, job_id="1", chain=["1", "2", "3"])
    (found,) = resolve_states([path])
    assert (found.state, found.job_ids) == (state, ["1", "2", "3"])
    # A job that was sent later, or a process, is none of them.
    RunDir(path).write_status(job_id="9")
    assert resolve_states([path])[0].job_ids == ["9"]


def test_while_slurm_does_not_answer_a_later_job_of_a_chain_may_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    log = tmp_path / "log.out"
    log.write_text("DUE TO TIME LIMIT")
    keys = {"state": "running", "chain": ["1", "2"], "job_log": str(log)}
    paths = [run(tmp_path / job_id, job_id=job_id, **keys) for job_id in ("1", "2")]
    assert [found.state for found in resolve_states(paths)] == ["unknown", "timeout"]


def test_who_cancelled_is_not_part_of_the_state(clients: Clients) -> None:
    clients(sacct="3|CANCELLED by 1000|0:0")
    assert ask_slurm(["3"]) == {"3": JobState("CANCELLED")}


@pytest.mark.parametrize("job", [None, "COMPLETED", "FAILED", UNREACHED])
def test_a_run_that_paused_needs_no_job(tmp_path: Path, job: str | None) -> None:
    path = run(tmp_path, state="paused", step=3, job_id="7")
    found = resolve_state(path, RunDir(path).read_status(), JobState(job) if job else None)
    assert (found.state, found.ended) == ("paused", True)


@pytest.mark.parametrize(
    ("state", "step", "stop_at", "expected"),
    [
        ("paused", 3, 3, True),
        ("paused", 3, 5, False),
        ("paused", 3, None, False),
        ("paused", 5, 3, True),
        ("running", 3, 3, False),  # Its checkpoint may not be saved yet.
        ("stopped", 4, 3, False),  # Of a step alone nobody knows whether it was saved.
        ("done", 8, None, True),
        ("done", 8, 3, True),
        ("failed", 8, None, False),
    ],
)
def test_a_run_has_trained_as_far_as_its_config_says(
    tmp_path: Path, tiny: Callable[..., Any], state: str, step: int, stop_at: int | None,
    expected: bool,
) -> None:  # fmt: skip
    cfg = tiny(f"trainer.stop_at={'null' if stop_at is None else stop_at}")
    assert has_trained(run(tmp_path, state=state, step=step), cfg) is expected


def test_a_folder_without_a_status_is_missing(tmp_path: Path) -> None:
    assert resolve_states([tmp_path / "nothing"])[0].state == "missing"


def test_a_run_of_this_machine_runs_as_long_as_its_process(tmp_path: Path) -> None:
    path = run(tmp_path / "run", state="running", job_id=None)
    write_json(path / "provenance.json", {"attempts": [{"host": socket.gethostname()}]})
    (path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    assert resolve_states([path])[0].state == "running"
    ended = subprocess.Popen(["true"])
    ended.wait()
    (path / ".lock").write_text(f"process {ended.pid} on {socket.gethostname()}")
    assert resolve_states([path])[0].state == "failed"


def test_the_status_of_a_run_on_another_machine_counts(tmp_path: Path) -> None:
    path = run(tmp_path / "run", state="running", job_id=None)
    write_json(path / "provenance.json", {"attempts": [{"host": "elsewhere"}]})
    assert resolve_states([path])[0].state == "running"


def test_the_job_s_id_is_that_of_the_array_s_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert current_job_id() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert current_job_id() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert current_job_id() == "10_2"


def test_cancelling_a_local_job_ends_what_it_started(tmp_path: Path) -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 60; true"])
    cancel_jobs([f"{LOCAL}{shell.pid}"])
    assert shell.wait(timeout=10) != 0


@pytest.mark.parametrize(
    ("status", "job", "state", "remark"),
    [
        ({"state": "running"}, JobState("NODE_FAIL", "n1"), "node_fail", "n1"),
        (
            {"state": "running", "last_error": "Boom"},
            JobState("NODE_FAIL", "n1"),
            "node_fail",
            "Boom",
        ),
        ({"state": "queued", "job_id": "7", "cancelled": 1.0}, None, "cancelled", ""),
        ({"state": "stopped", "stop_cause": "preempted"}, None, "preempted", ""),
        ({"state": "failed", "last_error": "Boom"}, None, "failed", "Boom"),
        ({"state": "queued", "job_id": "7"}, None, "missing", "never started"),
        ({"state": "queued"}, None, "missing", ""),
        (
            {"state": "queued"},
            JobState("FAILED"),
            "failed",
            "the job ended before the run started",
        ),
        (
            {"state": "running", "job_id": "7"},
            None,
            "failed",
            "the process disappeared without an error",
        ),
        ({"state": "queued"}, JobState("PENDING", "Priority"), "queued", "Priority"),
    ],
)
def test_a_state_says_why(
    tmp_path: Path, status: dict[str, object], job: JobState | None, state: str, remark: str
) -> None:
    found = resolve_state(tmp_path, status, job)
    assert (found.state, found.remark) == (state, remark)
    assert found.active == (state == "queued")


def test_a_stop_without_a_cause_takes_it_from_the_job_s_log(tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    log.write_text("*** JOB 3 ON n1 CANCELLED AT 2026-11-23T03:35:35 DUE TO TIME LIMIT ***\n")
    status = {"state": "stopped", "job_log": str(log)}
    assert resolve_state(tmp_path, status, None).state == "timeout"


def test_a_local_job_is_looked_up_by_its_process_alone(tmp_path: Path, clients: Clients) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    paths = [
        run(tmp_path / str(pid), state="running", job_id=f"{LOCAL}{pid}")
        for pid in (os.getpid(), ended.pid)
    ]
    clients(squeue="\n".join(f"{LOCAL}{path.name}|PENDING|None" for path in paths))
    assert [state.state for state in resolve_states(paths)] == ["running", "failed"]


def test_a_zombie_is_no_process() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_process(child.pid)
    assert is_process(os.getpid())


def test_logs_are_those_of_the_ranks_in_order_then_the_job_s(tmp_path: Path) -> None:
    names = ["rank_0.log", "rank_2.log", "rank_10.log", "job.out"]
    (tmp_path / "logs").mkdir()
    for name in names:
        (tmp_path / "logs" / name).touch()
    status = {"job_log": str(tmp_path / "logs" / "job.out")}
    assert [log.name for log in logs_of(tmp_path, status)] == names
    assert last_line(logs_of(tmp_path, status)) == ""
    (tmp_path / "logs" / "rank_2.log").write_text("one\n two \n\n")
    assert last_line(logs_of(tmp_path, status)) == "two"
