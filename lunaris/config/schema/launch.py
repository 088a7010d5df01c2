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
    # Processes, one a GPU where there are GPUs.
    processes: int = key(1, low=1)
    # Times that the group is started again after a process failed.
    max_restarts: int = key(0, low=0)


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
    # Shell lines run before the tasks start.
    setup: list[str] = field(default_factory=list)
    # Seconds before the limit at which SLURM signals the job to save and requeue.
    signal_delay_s: int = key(120, low=1)
    # Times that a job which ran out of time is requeued.
    max_num_timeout: int = key(1000, low=0)
    # Points of a sweep that run at a time.
    array_parallelism: int = key(256, low=1)
    # Any further sbatch option: name -> value.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    # Print the script and send nothing.
    dry_run: bool = False
    # Block until the job has ended; a sweep then returns each point's best validation loss.
    wait: bool = False
