"""The schemas of how processes share the work. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component, key


@dataclass
class ParallelismConfig(Component):
    """How the processes of a run share the work."""

    _group_ = "parallelism"


@dataclass
class AutoConfig(ParallelismConfig):
    """`single` with one process, `ddp` with several (`lunaris.config.decide`)."""

    _target_: str = "lunaris.config.schema.parallelism.AutoConfig"

    def left_open(self) -> bool:
        """Return whether it is to be decided; a custom class chosen over it inherits its keys."""
        return self._target_ == AutoConfig._target_


@dataclass
class SingleConfig(ParallelismConfig):
    """One process."""

    _target_: str = "lunaris.parallelism.single.Single"


@dataclass
class DDPConfig(ParallelismConfig):
    """The model replicated in every process; gradients averaged."""

    _target_: str = "lunaris.parallelism.ddp.DDP"
    # Processes that share one set of experts; divides the world and moe.n_experts.
    expert_parallel: int = key(1, low=1)


@dataclass
class FSDPConfig(DDPConfig):
    """Parameters, gradients and optimizer state sharded over all processes (ZeRO-3)."""

    _target_: str = "lunaris.parallelism.fsdp.FSDP"
    # Free a block's gathered parameters after its forward; false keeps them until its backward.
    reshard_after_forward: bool = True


@dataclass
class HSDPConfig(FSDPConfig):
    """Sharded within groups of `shard_size` processes, replicated across the groups."""

    _target_: str = "lunaris.parallelism.fsdp.HSDP"
    # Null: the processes of one node.
    shard_size: int | None = key(None, low=1)
