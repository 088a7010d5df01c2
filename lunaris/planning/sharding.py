"""Which part of each parameter a process holds, and what it gathers and exchanges. No torch.

The rules are those of `lunaris.parallelism`: DDP replicates, FSDP shards along the first dimension
that divides evenly (else the first one, padded), experts are first split over `expert_parallel`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lunaris.config.identity import world_size
from lunaris.config.schema.parallelism import DDPConfig, FSDPConfig, HSDPConfig
from lunaris.config.schema.root import Config
from lunaris.distributed.mesh import Mesh
from lunaris.planning.parameters import Kind, Parameter

# What autocast reads in float32 inside blocks: not sharded in half precision.
_EXACT = (Kind.ROUTER, Kind.NORM, Kind.BIAS)


@dataclass(frozen=True)
class Layout:
    """How a config's processes share its parameters."""

    mesh: Mesh
    sharded: bool
    reshard: bool
    half: bool

    def local(self, parameter: Parameter) -> int:
        """Return how many elements of a parameter the first process holds, padding included."""
        shape = list(parameter.shape)
        shards = self.shards(parameter)
        taken = -1
        if parameter.kind is Kind.EXPERT and self.mesh.expert > 1:
            shape[0] //= self.mesh.expert
            taken = 0
        if shards == 1:
            return math.prod(shape)
        for dim, size in enumerate(shape):
            if dim != taken and size % shards == 0:
                shape[dim] //= shards
                return math.prod(shape)
        shape[0] = math.ceil(shape[0] / shards)
        return math.prod(shape)

    def shards(self, parameter: Parameter) -> int:
        """Return over how many processes a parameter (of a process's experts) is sharded."""
        if not self.sharded or (self.half and parameter.unit and parameter.kind in _EXACT):
            return 1
        within = parameter.kind is Kind.EXPERT and self.mesh.expert > 1
        return self.mesh.shard if within else self.mesh.shard * self.mesh.expert

    def gathered(self, parameter: Parameter) -> int:
        """Return the bytes of a sharded parameter while its module computes; 0 if not sharded."""
        if self.shards(parameter) == 1 and not self.sharded:
            return 0
        if self.half and parameter.unit and parameter.kind in _EXACT:
            return 0
        experts = self.mesh.expert if parameter.kind is Kind.EXPERT else 1
        return parameter.numel // experts * (2 if self.half and parameter.unit else 4)


def layout_of(cfg: Config, processes: int | None = None) -> Layout:
    """Return the layout of a config. processes: None takes as many as `launch` starts."""
    world = world_size(cfg) if processes is None else processes
    half = cfg.trainer.half()
    keys = cfg.parallelism
    if isinstance(keys, FSDPConfig):
        size = None
        if isinstance(keys, HSDPConfig):
            size = keys.shard_size or min(world, cfg.launch.processes_per_node())
        mesh = Mesh.sharded(world, keys.expert_parallel, size)
        return Layout(mesh, True, keys.reshard_after_forward, half)
    degree = keys.expert_parallel if isinstance(keys, DDPConfig) else 1
    return Layout(Mesh.replicated(world, degree), False, False, half)
