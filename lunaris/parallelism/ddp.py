"""The model replicated in every process, gradients averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lunaris import distributed
from lunaris.parallelism.base import Parallelism, compile_blocks, materialize
from lunaris.parallelism.expert import (
    check_degree,
    expert_grads,
    scale_expert_grads,
    spread_experts,
)
from lunaris.precision import Precision


class DDP(Parallelism):
    """Data parallelism by torch's DistributedDataParallel.

    With `expert_parallel` P above 1, each process holds 1/P of the experts, and everything else
    whole.
    """

    def __init__(self, *, expert_parallel: int = 1) -> None:
        super().__init__()
        distributed.ensure_group()
        check_degree(expert_parallel, self.world_size, "the number of processes")
        self._expert_parallel = expert_parallel
        self._replicas: dist.ProcessGroup | None = None

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Allocate this process's part on the device, draw its weights, and wrap it."""
        spread: list[str] = []
        if self._expert_parallel > 1:
            mesh = init_device_mesh(
                self.device.type,
                (self.world_size // self._expert_parallel, self._expert_parallel),
                mesh_dim_names=("replica", "expert"),
            )
            self._replicas = mesh.get_group("replica")
            spread_experts(model, mesh["expert"], compile)
            spread = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
        materialize(model, self.device, seed)
        if compile:
            compile_blocks(model)
        # Buffers follow from sums over all processes, so they are the same in each.
        ignored = spread + [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Every process drew the same weights: nothing to send.
            init_sync=False,
            gradient_as_bucket_view=True,
        )

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients in the last micro-step's backward only."""
        assert isinstance(model, DistributedDataParallel)
        with super().micro_step(model, last):
            if not last:
                with model.no_sync():
                    yield
                return
            yield
            if self._replicas is not None:
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
