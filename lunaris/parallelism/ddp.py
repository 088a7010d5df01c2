"""The model replicated in every process, gradients averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lunaris.parallelism.base import Parallelism, compile_blocks, materialize
from lunaris.parallelism.expert import (
    check_degree,
    expert_grads,
    scale_expert_grads,
    spread_experts,
)
from lunaris.parallelism.reducer import Reducer
from lunaris.precision import Precision


class DDP(Parallelism):
    """Data parallelism: every process holds the model, gradients are averaged.

    With `expert_parallel` P above 1, each process holds 1/P of the experts, and everything else
    whole.
    """

    def __init__(self, *, expert_parallel: int = 1) -> None:
        super().__init__()
        check_degree(expert_parallel, self.world_size, "the number of processes")
        self._expert_parallel = expert_parallel
        self._replicas: dist.ProcessGroup | None = None
        self._reducer: Reducer | None = None

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Allocate this process's part on the device and draw its weights."""
        if self._expert_parallel > 1:
            mesh = init_device_mesh(
                self.device.type,
                (self.world_size // self._expert_parallel, self._expert_parallel),
                mesh_dim_names=("replica", "expert"),
            )
            self._replicas = mesh.get_group("replica")
            spread_experts(model, mesh["expert"], compile)
        # Every process draws the same weights, and updates buffers by sums over all: no broadcast.
        materialize(model, self.device, seed)
        if compile:
            compile_blocks(model)
        if self.world_size > 1:
            whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
            self._reducer = Reducer(whole)
        return model

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients in the last micro-step's backward only."""
        exchanged = self._reducer if last else None
        if exchanged is not None:
            exchanged.begin()
        with super().micro_step(model, last):
            yield
        if exchanged is not None:
            exchanged.finish()
        if last and self._replicas is not None:
            self._sum_experts(model)
            scale_expert_grads(model, 1 / self.world_size)

    def _sum_experts(self, model: nn.Module) -> None:
        """Sum the experts' gradients over the processes that hold the same experts."""
        pending = [
            dist.all_reduce(grad, group=self._replicas, async_op=True)
            for grad in expert_grads(model)
        ]
        for work in pending:
            work.wait()
