"""Chains of jobs: how they are sent, and what each of them does with the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from submitit.core.utils import FailedSubmissionError

from lunaris.errors import UserError
from lunaris.launch import sending, slurm_task
from lunaris.launch.slurm import Slurm
from lunaris.launch.slurm_task import Task
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir


class Sent:
    """Takes jobs as SLURM would, with ids from 10 on; refuses the one of a number."""

    def __init__(self, refuse: int = -1) -> None:
        self.jobs: list[tuple[list[str], list[int], list[str]]] = []
        self.refuse = refuse

    def __call__(self, tasks: list[Task], after: Sequence[str], parallelism: int) -> list[Any]:
        number = len(self.jobs)
        if number == self.refuse:
            raise FailedSubmissionError("sbatch: error: no more")
        names = [task.path.name for task in tasks]
        self.jobs.append((names, [task.link for task in tasks], list(after)))
        ids = [
            f"{10 + number}_{i}" if len(tasks) > 1 else f"{10 + number}" for i in range(len(tasks))
        ]
        return [SimpleNamespace(job_id=i, paths=SimpleNamespace(stdout=f"{i}.out")) for i in ids]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of three runs, of which SLURM takes two in an array."""
    monkeypatch.setattr(sending, "max_array_size", lambda: 2)
    paths = [Path(name) for name in "abc"]
    for path in paths:
        path.mkdir()
    return paths


def test_each_job_of_a_chain_waits_for_the_end_of_the_one_before(three: list[Path]) -> None:
    sent = Sent()
    keys = Slurm(chain=2, array_parallelism=1).keys
    assert sending.send_all(three, keys, sent, ["afterok:3"]) == ["10_0", "10_1", "12"]
    assert sent.jobs == [
        (["a", "b"], [1, 1], ["afterok:3"]),
        (["a", "b"], [2, 2], ["afterok:3", "afterany:10"]),
        # One lane: the second part waits for the end of the first one's chain.
        (["c"], [1], ["afterok:3", "afterany:11"]),
        (["c"], [2], ["afterok:3", "afterany:12"]),
    ]
    status = RunDir("b").read_status()
    assert (status["job_id"], status["chain"]) == ("10_1", ["10_1", "11_1"])
    assert status["job_log"] == "10_1.out"


def test_a_chain_is_sent_completely_or_not_at_all(
    three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(sending, "cancel_jobs", cancelled.extend)
    with pytest.raises(UserError, match=r"refuses the job: no more \(2 points were sent before\)"):
        sending.send_all(three, Slurm(chain=3).keys, Sent(refuse=4), [])
    assert cancelled == ["13"]
    assert RunDir("c").read_status()["state"] == "failed"
    assert "state" not in RunDir("a").read_status()


def test_a_command_that_is_interrupted_between_two_jobs_leaves_no_unknown_one(
    three: list[Path],
) -> None:
    sent = Sent()

    def interrupted(*args: Any) -> Any:
        if len(sent.jobs) == 1:
            raise KeyboardInterrupt
        return sent(*args)

    with pytest.raises(KeyboardInterrupt):
        sending.send_all(three, Slurm(chain=3).keys, interrupted, [])
    assert RunDir("a").read_status()["chain"] == ["10_0"]
    assert RunDir("b").read_status()["job_id"] == "10_1"


@pytest.fixture
def in_job(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose chain is jobs 7, 8 and 9; this process is the only rank of job 8."""
    run_dir: RunDir = create(tiny("launch=slurm", "launch.chain=3"), "test", [])
    run_dir.write_status(state="queued", job_id="7", chain=["7", "8", "9"], step=5)
    monkeypatch.setattr(slurm_task, "export_ranks", lambda: None)
    paths = SimpleNamespace(paths=SimpleNamespace(stdout="8.out"))
    monkeypatch.setattr(slurm_task, "JobEnvironment", lambda: paths)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    for name in ("RANK", "OMP_NUM_THREADS", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(slurm_task, "main", lambda argv: 3)
    return run_dir


@pytest.mark.parametrize(
    ("link", "timed_out", "expected"),
    [(2, False, ("queued", None, 0, 0)), (2, True, ("queued", None, 1, 0)),
     (3, True, ("stopped", "timeout", 1, 3)), (3, False, ("stopped", "preempted", 0, 3))],
)  # fmt: skip
def test_a_stopped_job_leaves_the_run_to_the_next_and_the_last_one_says_why(
    in_job: RunDir, monkeypatch: pytest.MonkeyPatch, link: int, timed_out: bool, expected: Any
) -> None:
    job = SimpleNamespace(timed_out=timed_out, ours_to_requeue=True)
    monkeypatch.setattr(slurm_task, "Job", SimpleNamespace(now=lambda seconds, launch: job))
    code = 0
    try:
        in_job.write_status(state="stopped")
        Task(in_job.path, link, 3)()
    except SystemExit as ended:
        code = int(str(ended.code))
    status = in_job.read_status()
    found = (status["state"], status["stop_cause"], status["timeouts"], code)
    assert found == expected
    assert (status["job_id"], status["job_log"]) == ("8", "8.out")


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"state": "done"}, 0), ({"cancelled": 1.0}, 1), ({"chain": ["17"]}, 1), ({"chain": []}, 1)],
)  # fmt: skip
def test_a_later_job_that_has_nothing_to_do_changes_nothing(
    in_job: RunDir, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: int
) -> None:
    monkeypatch.setattr(slurm_task, "main", lambda argv: pytest.fail("it trains"))
    in_job.write_status(**changes)
    before = in_job.read_status()
    if code:
        with pytest.raises(SystemExit) as ended:
            Task(in_job.path, 2, 3)()
        assert ended.value.code == code
    else:
        Task(in_job.path, 2, 3)()
    assert in_job.read_status() == before


def test_a_chain_on_this_machine_is_refused() -> None:
    with pytest.raises(UserError, match="launch.chain=3: needs SLURM"):
        Slurm(chain=3, cluster="local")
