"""The model replicated in every process, gradients averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lunaris import distributed
from lunaris.parallelism.base import Parallelism, compile_blocks, materialize
from lunaris.precision import Precision


class DDP(Parallelism):
    """Data parallelism by torch's DistributedDataParallel."""

    def __init__(self, *, expert_parallel: int = 1) -> None:
        super().__init__()
        self._expert_parallel = expert_parallel

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Allocate the whole model on the device, draw its weights, and wrap it."""
        distributed.ensure_group()
        materialize(model, self.device, seed)
        if compile:
            compile_blocks(model)
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Buffers follow from sums over all processes, so they are the same in each.
            broadcast_buffers=False,
            # Every process drew the same weights: nothing to send.
            init_sync=False,
            gradient_as_bucket_view=True,
        )

    def micro_step(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients in the last micro-step's backward only."""
        context = super().micro_step(model, last)
        return context if last else model.no_sync()  # type: ignore[operator]
