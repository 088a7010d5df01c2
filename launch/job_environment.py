"""What surrounds the tasks of a SLURM job: modules, environments, a container, srun's options."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.errors import UserError
from lunaris.launch.submitit_internals import HELD

# The variable that names the file in which rank 0 writes the folder of its run, for the script.
RUN_FILE = "LUNARIS_RUN_FILE"


def setup_lines(keys: SlurmLaunchConfig, logs: Path, code: Path) -> list[str]:
    """Return the lines of the job's script before its tasks start.

    logs: the folder of submitit's files. code: the frozen copy.
    """
    lines = []
    if keys.modules:
        # A script is no login shell, which is where some sites define `module`.
        lines.append("command -v module >/dev/null || . /etc/profile")
        lines.append(f"module load {shlex.join(keys.modules)} || exit 1")
    if keys.conda is not None:
        lines.append('eval "$(conda shell.bash hook)" || exit 1')
        lines.append(f"conda activate {shlex.quote(keys.conda)} || exit 1")
    if keys.venv is not None:
        activate = Path(keys.venv).expanduser().absolute() / "bin" / "activate"
        lines.append(f". {shlex.quote(str(activate))} || exit 1")
    return [
        *lines,
        *map(str, keys.setup),
        # Last, so that no `module load` puts another folder before it.
        f"export PYTHONPATH={shlex.quote(str(code))}:${{PYTHONPATH:+$PYTHONPATH:}}"
        f"{shlex.quote(os.getcwd())}",
        # Otherwise the code in the current folder, perhaps edited since, would come first.
        "export PYTHONSAFEPATH=1",
        # The script runs on the job's first node, where rank 0 is, outside a container.
        f"export LUNARIS_MASTER_PORT=$({_interpreter(keys, container=False)} -I -S "
        f'{shlex.quote(str(code / "lunaris" / "launch" / "free_port.py"))} "$SLURM_JOB_ID")',
        *_run_file(keys, logs),
    ]


def _run_file(keys: SlurmLaunchConfig, logs: Path) -> list[str]:
    """Return the line that names the file in which rank 0 says which run the job trains."""
    if teardown_lines(keys) is None:
        return []
    return [f"export {RUN_FILE}={shlex.quote(str(logs))}/.run_$SLURM_JOB_ID"]


def teardown_lines(keys: SlurmLaunchConfig) -> list[str] | None:
    """Return the lines of the job's script after its tasks have ended, or None for none."""
    if not keys.max_failures and not keys.preflight and keys.chain == 1:
        return None
    python = _interpreter(keys, container=False)
    module = "lunaris.launch.after_failure"
    return [
        f"code=$?; [ $code = 0 ] || {python} -S -m {module} "
        f'"${RUN_FILE}" $code {keys.max_failures}',
        f'rm -f "${RUN_FILE}"; exit $code',
    ]


def python_command(keys: SlurmLaunchConfig, folder: Path) -> str:
    """Return the command that starts python in each task, as the shell takes it.

    folder: of the run or the sweep, which a container must see.
    """
    python = _interpreter(keys, container=keys.container is not None)
    if keys.container is None:
        return f"{HELD} {python}"
    if keys.container_runtime == "pyxis":
        # The command runs inside, where `env` may be older or absent.
        return python
    binds = [part for path in _binds(keys, folder) for part in ("--bind", path)]
    inside = [keys.container_runtime, "exec", *binds, *keys.container_args, keys.container]
    return f"{HELD} {shlex.join(inside)} {python}"


def srun_args(keys: SlurmLaunchConfig, folder: Path) -> list[str]:
    """Return the options of the job's srun."""
    # A failed rank must end the job. A job step does not inherit --cpus-per-task.
    args = ["--kill-on-bad-exit=1", f"--cpus-per-task={keys.cpus_per_task}"]
    if keys.container is not None and keys.container_runtime == "pyxis":
        mounts = ",".join(_whole(path) for path in _binds(keys, folder))
        args += [f"--container-image={keys.container}", f"--container-mounts={mounts}"]
        args += [f"--container-workdir={os.getcwd()}", *keys.container_args]
    return [*args, *keys.srun_args]


def sbatch_options(keys: SlurmLaunchConfig, after: Sequence[str] = ()) -> dict[str, Any]:
    """Return further options of sbatch by their names; those of `additional_parameters` count.

    after: dependencies as sbatch takes them, which are joined to those of the keys.
    """
    mail = {} if keys.mail is None else {"mail-user": keys.mail, "mail-type": keys.mail_type}
    found = {"requeue": keys.chain == 1, "dependency": keys.dependency, **mail} | {
        str(key).replace("_", "-"): value for key, value in keys.additional_parameters.items()
    }
    if keys.exclusive:
        found.setdefault("exclusive", True)
    if found["requeue"] in (False, None):
        found |= {"requeue": None, "no-requeue": True}
    if after and "?" in (found["dependency"] or ""):
        raise UserError(
            f"launch.dependency={found['dependency']}: not where jobs wait for each other, because "
            "SLURM joins dependencies by either , or ?"
        )
    if after:
        found["dependency"] = ",".join([*filter(None, [found["dependency"]]), *after])
    if any(each.startswith("afterok") for each in after):
        # Else a job whose dependency cannot be met any more waits for ever.
        found.setdefault("kill-on-invalid-dep", "yes")
    # A flag that is off is left out.
    return {
        name: value for name, value in found.items() if value is not None and value is not False
    }


def _interpreter(keys: SlurmLaunchConfig, *, container: bool) -> str:
    """Return the python of the tasks: `launch.python`, else that of the environment or here."""
    if keys.python is not None and (container or keys.container is None):
        return shlex.quote(keys.python)
    own = container or keys.conda is not None or keys.venv is not None
    return "python" if own else shlex.quote(sys.executable)


def _binds(keys: SlurmLaunchConfig, folder: Path) -> list[str]:
    """Return what the container sees of the host: the run, the current folder, and what is asked.

    The copy of the code is in the folder of the run.
    """
    return list(dict.fromkeys([str(folder), os.getcwd(), *keys.container_binds]))


def _whole(path: str) -> str:
    """Return a bind as pyxis takes it, which needs the path inside the container."""
    return path if ":" in path else f"{path}:{path}"
