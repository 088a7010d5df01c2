"""What the loop knows of a parallelism, and what all of them share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lunaris.distributed import session as distributed
from lunaris.precision import Precision


class Parallelism:
    """Spreads a model over the processes of a run. Every process is a data rank.

    Subclasses say how in `wrap`, and when gradients are exchanged in `micro_step`. All of them
    leave in `parameter.grad` the gradient of the mean over processes of their losses.
    """

    def __init__(self) -> None:
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()
        self.device = distributed.device()

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Return what the loop calls, built from a model on the meta device.

        Memory is allocated for this process's part only, and filled by `model.init_weights(seed)`,
        which gives the same numbers whatever the parallelism. compile: torch.compile each block.
        """
        raise NotImplementedError

    def micro_step(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-step's forward and backward.

        Gradients are complete, over micro-steps and processes, once the context of the last one
        is left.
        """
        distributed.mark("a micro-step")
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` (any shape, on the device) over all processes."""
        if self.world_size > 1:
            distributed.mark("summing metrics over the processes")
            values = values.contiguous().clone()
            dist.all_reduce(values)
        return values

    def agree(self, flag: bool) -> bool:
        """Return whether any process says true; called once a step, after it, by all."""
        distributed.mark("the end of a step")
        result = distributed.any_rank(flag)
        distributed.end_first_step()
        return result

    def barrier(self) -> None:
        """Wait for every process."""
        distributed.barrier()


def unwrap(model: nn.Module) -> Any:
    """Return the Transformer inside what `wrap` returned: itself, for every parallelism here."""
    return model


def materialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Allocate a model that is on the meta device, and draw its weights from `seed`."""
    model.to_empty(device=device)
    model.init_weights(seed)  # type: ignore[operator]


def compile_blocks(model: Any) -> None:
    """Compile each block's forward: blocks are alike, so one compilation serves all.

    The forward method is compiled and not the module, so that names stay clean and hooks of
    FSDP run outside the compiled region.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
