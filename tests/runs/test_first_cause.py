"""Why a job of several ranks failed, from the files of its ranks and the log of its job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import JobState
from lunaris.runs.status import logs_of, resolve_state

RESET = "RuntimeError: Connection reset by peer"
END = """\
srun: launch/slurm: _step_signal: Terminating StepId=19.0
slurmstepd-n1: error: *** STEP 19.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***
srun: error: n1: task 0: Exited with exit code 1
"""
KILLED = "srun: error: n1: task 2: Killed\n" + END
NO_MEMORY = "srun: error: n1: tasks 2-3: Out Of Memory\n" + END
DETECTED = KILLED + "slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=19.0.\n"
HUNG = "rank 2 has sent no heartbeat for 15 s (last: train)"


def failed_run(path: Path, log: str, errors: dict[int, tuple[float, str]]) -> RunDir:
    """Write the files of a run of four ranks, which wrote `errors` (time and message)."""
    run_dir = RunDir(path)
    run_dir.logs.mkdir(parents=True)
    for rank in range(4):
        (run_dir.logs / f"rank_{rank}.log").write_text("a line\n")
    for rank, (at, text) in errors.items():
        content = {"message": {"message": text, "extraInfo": {"time": at}}}
        (run_dir.logs / f".error_{rank}.json").write_text(json.dumps(content))
    job_log = path / "job.out"
    earlier = "Starting with JobEnvironment\nsrun: error: n1: task 3: Killed\n"
    job_log.write_text(f"{earlier}Starting with JobEnvironment\n{log}")
    run_dir.write_status(job_id="19", job_log=str(job_log))
    return run_dir


@pytest.mark.parametrize("written", ["failed", "running"])
@pytest.mark.parametrize(
    ("log", "errors", "rank", "state", "said"),
    [
        (KILLED, {0: (1.0, RESET)}, 2, "failed", "rank 2: killed by SIGKILL"),
        (NO_MEMORY, {0: (1.0, RESET)}, 2, "out_of_memory", "rank 2: out of memory"),
        (DETECTED, {0: (1.0, RESET)}, 2, "out_of_memory", "rank 2: out of memory"),
        (END, {0: (2.0, RESET), 1: (1.0, "ValueError: x")}, 1, "failed", "rank 1: ValueError: x"),
        (END, {0: (1.0, HUNG), 1: (2.0, "the store")}, 2, "failed", HUNG),
        # SLURM itself killed rank 2, after rank 1 had failed.
        (END + "srun: error: n1: task 2: Killed\n", {1: (1.0, "E")}, 1, "failed", "rank 1: E"),
    ],
)
def test_the_first_cause_its_rank_and_its_log_are_told(
    tmp_path: Path,
    written: str,
    log: str,
    errors: dict[int, tuple[float, str]],
    rank: int,
    state: str,
    said: str,
) -> None:
    run_dir = failed_run(tmp_path, log, errors)
    run_dir.write_status(state=written, last_error=f"rank 0: {RESET}")
    status = run_dir.read_status()
    for job in (JobState("FAILED", "NonZeroExitCode"), None):
        shown = resolve_state(tmp_path, status, job)
        assert shown.state == state and shown.remark.startswith(said)
    names = [path.name for path in logs_of(tmp_path, status)]
    assert names[0] == f"rank_{rank}.log" and len(set(names)) == 5


def test_a_cancelled_job_has_no_first_cause(tmp_path: Path) -> None:
    log = "slurmstepd: error: *** JOB 19 ON n1 CANCELLED AT 2026 ***\n" + KILLED
    run_dir = failed_run(tmp_path, log, {})
    run_dir.write_status(state="running")
    assert resolve_state(tmp_path, run_dir.read_status(), None).state == "cancelled"
