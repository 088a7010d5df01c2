"""The schemas of where processes start. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from lunaris.config.schema.base import Component, key
from lunaris.config.schema.trainer import AUTO
from lunaris.errors import UserError, did_you_mean

# The types of `sbatch --dependency`.
_DEPENDENCIES = (
    "after", "afterany", "afterburstbuffer", "aftercorr", "afterok", "afternotok", "singleton",
)  # fmt: skip
# The keys that the local executor has no counterpart of.
_OF_SLURM = (
    "container", "after", "dependency", "mail", "srun_args", "exclusive", "python", "max_failures",
    "preflight",
)  # fmt: skip


@dataclass
class LaunchConfig(Component):
    """The keys that every launcher has."""

    _group_ = "launch"
    # Seconds after which a collective that did not complete ends the job; in the first step and the
    # first evaluation, half an hour.
    collective_timeout_s: float = key(120.0, above=0)

    def processes_per_node(self) -> int:
        """Return the number of processes on each machine: of several nodes, by default one per GPU.

        A custom launcher without a schema may have the keys of either of ours.
        """
        if not hasattr(self, "nodes"):
            return int(getattr(self, "processes", 1))
        tasks, gpus = getattr(self, "tasks_per_node", None), getattr(self, "gpus_per_node", None)
        return int(tasks or gpus or 1)

    def world_size(self) -> int:
        """Return the number of processes that the launcher starts."""
        return int(getattr(self, "nodes", 1) * self.processes_per_node())


@dataclass
class LocalLaunchConfig(LaunchConfig):
    """This machine."""

    _target_: str = "lunaris.launch.local.Local"
    # Processes: a number, or auto, which launch=local sets: one on each GPU of this machine, and 1
    # without GPUs and in a point of a sweep. A run that is continued keeps its number.
    processes: Any = 1
    # Times that the group is started again after a process failed.
    max_restarts: int = key(0, low=0)
    # Points of a sweep that run at a time; null: as many as there are GPUs for, or 1.
    points_at_once: int | None = key(None, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.processes
        if given != AUTO and (type(given) is not int or given < 1):
            raise UserError(
                f"launch.processes={given}: must be a whole number of at least 1, or {AUTO}"
            )


@dataclass
class SlurmLaunchConfig(LaunchConfig):
    """A SLURM cluster, through submitit; names of keys as in hydra-submitit-launcher."""

    _target_: str = "lunaris.launch.slurm.Slurm"
    # slurm, or local: submitit's local executor, to rehearse a submission on a laptop.
    cluster: str = key("slurm", allowed=("slurm", "local"))
    # Machines of the job.
    nodes: int = key(1, low=1)
    # GPUs asked for on each node.
    gpus_per_node: int = key(0, low=0)
    # Null: one task a GPU, or one task without GPUs.
    tasks_per_node: int | None = key(None, low=1)
    # Cores of each process.
    cpus_per_task: int = key(1, low=1)
    # Memory asked for on each node, in GB; null: the partition's default.
    mem_gb: float | None = key(None, above=0)
    # Time limit in minutes; the job is requeued and goes on.
    timeout_min: int = key(60, low=1)
    # Null: the cluster's default.
    partition: str | None = None
    # The account that is charged.
    account: str | None = None
    # Quality of service.
    qos: str | None = None
    # Features that nodes must have.
    constraint: str | None = None
    # Environment modules that the job loads first (`module load`).
    modules: list[str] = field(default_factory=list)
    # A conda environment, by name or folder, that the job activates.
    conda: str | None = None
    # The folder of a virtual environment that the job activates.
    venv: str | None = None
    # The tasks' python; null: that of conda, venv or the container, else the one of this command.
    python: str | None = None
    # Shell lines run before the tasks start, after modules, conda and venv.
    setup: list[str] = field(default_factory=list)
    # An image in which the tasks run; null: none.
    container: str | None = None
    # What runs the container; pyxis: srun --container-image.
    container_runtime: str = key("apptainer", allowed=("apptainer", "singularity", "pyxis"))
    # Folders that the container sees besides the run's and the current one: HOST[:INSIDE].
    container_binds: list[str] = field(default_factory=list)
    # Further options of the container, like --nv for NVIDIA's driver.
    container_args: list[str] = field(default_factory=list)
    # Further options of srun, like --cpu-bind=cores.
    srun_args: list[str] = field(default_factory=list)
    # The folder of a run, a sweep or a preparation, or a list, whose jobs must have ended well.
    after: Any = None
    # Jobs that must have ended before, as sbatch takes it: afterok:17.
    dependency: str | None = None
    # Whole nodes, which no other job shares.
    exclusive: bool = False
    # The address to which SLURM writes.
    mail: str | None = None
    # Of which events, as sbatch takes it.
    mail_type: str = "END,FAIL"
    # Seconds before the limit at which SLURM signals the job to save and requeue.
    signal_delay_s: int = key(120, low=1)
    # Times that a job which ran out of time is requeued.
    max_num_timeout: int = key(1000, low=0)
    # Times that a job whose run failed is requeued.
    max_failures: int = key(0, low=0)
    # Jobs that are sent at once, of which each continues the run when the one before has ended, for
    # sites that requeue no job; 1: the job requeues itself.
    chain: int = key(1, low=1)
    # Look at every node before the first step, and run without those that are slow or wrong.
    preflight: bool = False
    # Share of the nodes' median speed below which `preflight` leaves out a node.
    preflight_share: float = key(0.7, above=0, high=1.0)
    # Points of a sweep, or tasks of `lunaris prepare`, that run at a time.
    array_parallelism: int = key(256, low=1)
    # Tasks of the job array of `lunaris prepare`, if there is work for so many.
    array_tasks: int = key(8, low=1)
    # Any further sbatch option: name -> value.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    # Print the script and send nothing.
    dry_run: bool = False
    # Block until the job has ended; a sweep then returns each point's best validation loss.
    wait: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conda is not None and self.venv is not None:
            raise UserError(f"launch.conda={self.conda}: only one of launch.conda and launch.venv")
        for name in ("container_binds", "container_args"):
            if getattr(self, name) and self.container is None:
                shown = ",".join(map(str, getattr(self, name)))
                raise UserError(f"launch.{name}=[{shown}]: needs launch.container")
        requeues = self.additional_parameters.get("requeue", True) not in (False, None)
        for name in ("max_failures", "preflight"):
            if not getattr(self, name) or self.chain > 1 or requeues:
                continue
            raise UserError(
                f"launch.{name}={getattr(self, name)}: needs launch.chain above 1 or a job "
                "that may be requeued, without launch.additional_parameters.requeue=false"
            )
        self._check_after(self.after)
        if self.dependency is not None:
            self._check_dependency(self.dependency)
        asked = {name: getattr(self, name) for name in _OF_SLURM}
        for name, shown in (asked | {"chain": self.chain if self.chain > 1 else None}).items():
            if shown and self.cluster == "local":
                raise UserError(
                    f"launch.{name}={shown}: needs SLURM; launch.cluster=local starts the job here"
                )

    def awaited(self) -> list[str]:
        """Return the folders of the runs and sweeps that must have ended well before."""
        return [self.after] if isinstance(self.after, str) else list(self.after or [])

    def _check_after(self, given: Any) -> None:
        """Raise UserError for what is neither a folder's name nor a list of such."""
        folders = given if isinstance(given, list) else [given]
        if given is not None and not all(isinstance(f, str) and f.strip() for f in folders):
            raise UserError(
                f"launch.after={given}: must be the folder of a run or a sweep, or a list of them"
            )

    def _check_dependency(self, given: str) -> None:
        """Raise UserError for what is no list of `TYPE:JOB[:JOB…]` or `singleton`."""
        for part in re.split("[,?]", given):
            kind, _, jobs = part.partition(":")
            if kind not in _DEPENDENCIES:
                allowed = f"allowed are {', '.join(_DEPENDENCIES)}"
                raise UserError(
                    f"launch.dependency={given}: {kind!r} is no type of dependency; "
                    f"{allowed}{did_you_mean(kind, _DEPENDENCIES)}"
                )
            other = "launch.after" if self.awaited() else "launch.chain" if self.chain > 1 else ""
            if "?" in given and other:
                raise UserError(
                    f"launch.dependency={given}: not with {other}, because SLURM joins "
                    "dependencies by either , or ?"
                )
            if kind != "singleton" and not re.fullmatch(r"\d+[\d:_+]*", jobs):
                raise UserError(f"launch.dependency={given}: {kind} needs job ids: {kind}:17")
