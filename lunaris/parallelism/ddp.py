"""Data parallelism: a replica of the model in every process, gradients averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lunaris.distributed import session
from lunaris.distributed.mesh import Mesh
from lunaris.parallelism.base import Parallelism
from lunaris.parallelism.expert import scale_expert_grads, shard_experts
from lunaris.parallelism.reducer import Reducer
from lunaris.precision import Precision


class DDP(Parallelism):
    """Replicates the model in every process and averages gradients.

    With `expert_parallel` P above 1, each process has 1/P of the experts and a replica of all
    other parameters. Raises UserError if P does not divide the number of processes.
    """

    def __init__(self, *, expert_parallel: int = 1) -> None:
        super().__init__(Mesh.replicated(session.world_size(), expert_parallel))
        self._reducer: Reducer | None = None
        # One group is all processes: the backward leaves the complete sums of its experts.
        self._experts_are_alone = self.mesh.expert > 1 and self.mesh.replicate == 1

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int | None, compile: bool
    ) -> nn.Module:
        """Shard the experts, if they are to be, and let the backward average all gradients."""
        sharers: dist.ProcessGroup | None = None
        if self.mesh.expert > 1:
            mesh = self.mesh.device_mesh(self.device.type, "replicate", "expert")
            sharers = mesh.get_group("replicate")
            shard_experts(model, mesh["expert"], compile)
        # No broadcast: every process draws the same weights and updates buffers by the same sums.
        model = super().wrap(model, precision=precision, seed=seed, compile=compile)
        if self.data_world_size > 1:
            skipped = DTensor if self._experts_are_alone else ()
            shared = [p for p in model.parameters() if not isinstance(p, skipped)]
            self._reducer = Reducer(shared, sharers)
        return model

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Average gradients during the last micro-step's backward only."""
        reducer = self._reducer if last else None
        if reducer is not None:
            reducer.begin()
        with super().micro_step(model, last):
            yield
        if reducer is not None:
            reducer.finish()
        if last and self._experts_are_alone:
            scale_expert_grads(model, 1 / self.data_world_size)
