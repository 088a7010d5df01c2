"""The parts of submitit that are not public, and our only uses of them.

tests/launch/test_submitit_internals.py fails with a plain message when a new version of submitit
changes one of them.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from submitit.slurm.slurm import _make_sbatch_string

# A task of the local executor that exits with this code is started again.
REQUEUE_EXIT_CODE: int = LOCAL_REQUEUE_RETURN_CODE
# The module that a job of submitit runs.
JOB_MODULE = "submitit.core._submit"
# A line of the job's script, and the command that then starts python in each task: a signal that
# arrives before python can handle it waits until it does. An `env` older than coreutils 8.31 cannot
# block signals; there the variable is empty.
HOLD_SIGNALS = (
    "LUNARIS_ENV='env --block-signal=TERM --block-signal=USR1 --block-signal=USR2'; "
    "$LUNARIS_ENV true 2>/dev/null || LUNARIS_ENV="
)
HELD = "$LUNARIS_ENV"
# The first line of the job's script: a signal before the tasks start does not end the script but is
# handed on to them, in a variable; one that arrives later is srun's to forward.
SIGNALLED = "LUNARIS_SIGNALLED"
TRAP_SIGNALS = f"{SIGNALLED}=; trap '{SIGNALLED}=1' TERM USR1 USR2"


def sbatch_script(
    logs: Path, parameters: dict[str, Any], python: str, points: int | None = None
) -> str:
    """Return the sbatch script of a job, or of an array of `points`, that submitit would write.

    logs: the folder in which submitit keeps its files. parameters: submitit's own names. python:
    the command that starts it in a task.
    """
    command = f"{python} -u -m {JOB_MODULE} {shlex.quote(str(logs))}"
    return _make_sbatch_string(command=command, folder=logs, map_count=points, **parameters)
