"""The schemas of where processes start. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lunaris.config.schema.base import Component, key


@dataclass
class LaunchConfig(Component):
    """The keys that every launcher has."""

    _group_ = "launch"
    # Seconds after which a collective that did not complete ends the job, past the first step.
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
    processes: int = key(1, low=1)
    max_restarts: int = key(0, low=0)


@dataclass
class SlurmLaunchConfig(LaunchConfig):
    """A SLURM cluster, through submitit; names of keys as in hydra-submitit-launcher."""

    _target_: str = "lunaris.launch.slurm.Slurm"
    # slurm, or local: submitit's local executor, to rehearse a submission on a laptop.
    cluster: str = key("slurm", allowed=("slurm", "local"))
    nodes: int = key(1, low=1)
    gpus_per_node: int = key(0, low=0)
    # Null: one task a GPU, or one task without GPUs.
    tasks_per_node: int | None = key(None, low=1)
    cpus_per_task: int = key(1, low=1)
    mem_gb: float | None = key(None, above=0)
    timeout_min: int = key(60, low=1)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # Shell lines run before the tasks start.
    setup: list[str] = field(default_factory=list)
    # Seconds before the limit at which SLURM signals the job to save and requeue.
    signal_delay_s: int = key(120, low=1)
    max_num_timeout: int = key(1000, low=0)
    array_parallelism: int = key(256, low=1)
    # Any further sbatch option: name -> value.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    # Block until the job has ended; a sweep then returns each point's best validation loss.
    wait: bool = False
