"""Canaries: what we use of submitit without its being public works as in the version we know."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

Canary = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def canary(canary_of: Canary) -> Canary:
    """Return a context that fails, naming what submitit changed and where to adapt."""
    return partial(canary_of, "submitit", place="launch/submitit_internals.py")


def test_the_script_is_the_one_that_submitit_sends(canary: Canary) -> None:
    with canary("_make_sbatch_string"):
        from lunaris.launch.slurm import Slurm
        from lunaris.launch.submitit_internals import JOB_MODULE, sbatch_script

        logs = Path("/run/logs/slurm")
        parameters = Slurm(nodes=2).parameters("name", logs, Path("/code"))
        script = sbatch_script(logs, parameters, "python3", points=3)
        assert "#SBATCH --nodes=2\n" in script and "#SBATCH --array=0-2%3\n" in script
        assert f" python3 -u -m {JOB_MODULE} /run/logs/slurm" in script


def test_a_job_runs_the_module_that_the_script_names(canary: Canary) -> None:
    with canary("the module that a job runs"):
        from submitit.slurm.slurm import SlurmExecutor

        from lunaris.launch.submitit_internals import JOB_MODULE

        assert importlib.util.find_spec(JOB_MODULE) is not None
        command = inspect.getsource(SlurmExecutor._submitit_command_str.fget)  # type: ignore[attr-defined]
        assert JOB_MODULE in command


def test_the_local_executor_starts_a_requeued_task_again(canary: Canary) -> None:
    with canary("LOCAL_REQUEUE_RETURN_CODE"):
        from submitit.local import local

        from lunaris.launch.submitit_internals import REQUEUE_EXIT_CODE

        assert 0 < REQUEUE_EXIT_CODE < 256
        assert "LOCAL_REQUEUE_RETURN_CODE" in inspect.getsource(local.Controller)


def test_a_task_knows_its_executor_and_its_log_tells_its_start(canary: Canary) -> None:
    with canary("a job's environment", place="lunaris/runs/slurm_client.py"):
        from submitit.core import job_environment
        from submitit.local import local

        assert "SUBMITIT_EXECUTOR" in inspect.getsource(job_environment)
        assert "SUBMITIT_LOCAL_JOB_ID" in inspect.getsource(local)
    with canary("the first line of a job's log", place="lunaris/runs/status.py"):
        from submitit.core import submission

        assert "Starting with" in inspect.getsource(submission)
        assert "JobEnvironment" in job_environment.JobEnvironment.__name__
