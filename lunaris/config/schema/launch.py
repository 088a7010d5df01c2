"""The schemas of where processes start. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lunaris.config.schema.base import Component
from lunaris.config.schema.checks import above_zero, one_of, within


@dataclass
class LaunchConfig(Component):
    """The keys that every launcher has."""

    # Seconds after which a collective that did not complete ends the job, past the first step.
    collective_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        above_zero("launch.collective_timeout_s", self.collective_timeout_s)

    def world_size(self) -> int:
        """Return the number of processes that the launcher starts.

        Of a custom launcher without a schema, by the keys it is given: `nodes` and what follows,
        as for SLURM, or `processes`.
        """
        if not hasattr(self, "nodes"):
            return int(getattr(self, "processes", 1))
        tasks, gpus = getattr(self, "tasks_per_node", None), getattr(self, "gpus_per_node", None)
        return int(self.nodes * (tasks or gpus or 1))


@dataclass
class LocalLaunchConfig(LaunchConfig):
    """This machine."""

    _target_: str = "lunaris.launch.local.Local"
    processes: int = 1
    max_restarts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("launch.processes", self.processes, low=1)
        within("launch.max_restarts", self.max_restarts, low=0)


@dataclass
class SlurmLaunchConfig(LaunchConfig):
    """A SLURM cluster, through submitit; names of keys as in hydra-submitit-launcher."""

    _target_: str = "lunaris.launch.slurm.Slurm"
    # slurm, or local: submitit's local executor, to rehearse a submission on a laptop.
    cluster: str = "slurm"
    nodes: int = 1
    gpus_per_node: int = 0
    # Null: one task a GPU, or one task without GPUs.
    tasks_per_node: int | None = None
    cpus_per_task: int = 1
    mem_gb: float | None = None
    timeout_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # Shell lines run before the tasks start.
    setup: list[str] = field(default_factory=list)
    # Seconds before the limit at which SLURM signals the job to save and requeue.
    signal_delay_s: int = 120
    max_num_timeout: int = 1000
    array_parallelism: int = 256
    # Any further sbatch option: name -> value.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    # Block until the job has ended; a sweep then returns each point's best validation loss.
    wait: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("launch.cluster", self.cluster, ("slurm", "local"))
        for key in ("nodes", "tasks_per_node", "cpus_per_task", "timeout_min", "signal_delay_s",
                    "array_parallelism"):  # fmt: skip
            within(f"launch.{key}", getattr(self, key), low=1)
        within("launch.gpus_per_node", self.gpus_per_node, low=0)
        within("launch.max_num_timeout", self.max_num_timeout, low=0)
        above_zero("launch.mem_gb", self.mem_gb)

    def processes_per_node(self) -> int:
        """Return the tasks of one node: as given, else one per GPU, else one."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def world_size(self) -> int:
        """Return the number of processes that the launcher starts."""
        return self.nodes * self.processes_per_node()
