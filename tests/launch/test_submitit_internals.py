"""Canaries: what we use of submitit without its being public works as in the version we know."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest


@contextmanager
def canary(what: str, place: str = "launch/submitit_internals.py") -> Iterator[None]:
    """Fail with a message that names the package, its version and what it changed."""
    try:
        yield
    except Exception as error:
        version = metadata.version("submitit")
        pytest.fail(
            f"submitit {version} changed {what}: adapt {place}, or limit submitit in "
            f"pyproject.toml ({type(error).__name__}: {error})",
            pytrace=False,
        )


def test_the_script_is_the_one_that_submitit_sends() -> None:
    with canary("_make_sbatch_string"):
        from lunaris.launch.slurm import Slurm
        from lunaris.launch.submitit_internals import JOB_MODULE, sbatch_script

        parameters = Slurm(nodes=2).parameters("name", Path("/code"))
        script = sbatch_script(Path("/logs"), parameters, points=3)
        assert "#SBATCH --nodes=2\n" in script and "#SBATCH --array=0-2%3\n" in script
        assert f"-u -m {JOB_MODULE} /logs" in script


def test_a_job_runs_the_module_that_the_script_names() -> None:
    with canary("the module that a job runs"):
        from submitit.slurm.slurm import SlurmExecutor

        from lunaris.launch.submitit_internals import JOB_MODULE

        assert importlib.util.find_spec(JOB_MODULE) is not None
        command = inspect.getsource(SlurmExecutor._submitit_command_str.fget)  # type: ignore[attr-defined]
        assert JOB_MODULE in command


def test_the_local_executor_starts_a_requeued_task_again() -> None:
    with canary("LOCAL_REQUEUE_RETURN_CODE"):
        from submitit.local import local

        from lunaris.launch.submitit_internals import REQUEUE_EXIT_CODE

        assert 0 < REQUEUE_EXIT_CODE < 256
        assert "LOCAL_REQUEUE_RETURN_CODE" in inspect.getsource(local.Controller)


def test_a_task_knows_its_executor_and_its_log_tells_its_start() -> None:
    with canary("a job's environment", "lunaris/runs/slurm_client.py"):
        from submitit.core import job_environment
        from submitit.local import local

        assert "SUBMITIT_EXECUTOR" in inspect.getsource(job_environment)
        assert "SUBMITIT_LOCAL_JOB_ID" in inspect.getsource(local)
    with canary("the first line of a job's log", "lunaris/runs/status.py"):
        from submitit.core import submission

        assert "Starting with" in inspect.getsource(submission)
        assert "JobEnvironment" in job_environment.JobEnvironment.__name__
