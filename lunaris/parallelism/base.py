"""The interface between the training loop and a parallelism, and what all of them share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lunaris.distributed import collectives, session
from lunaris.distributed.mesh import Mesh
from lunaris.late import Late
from lunaris.model.init import reset_buffers
from lunaris.precision import Precision

if TYPE_CHECKING:
    from lunaris.model.transformer import Transformer

T = TypeVar("T")


class Parallelism:
    """Distributes a model over the processes of a run.

    Subclasses define in `wrap` how, and in `micro_step` when gradients are exchanged. All of them
    leave in `parameter.grad` the gradient of the mean over the data ranks of their losses.

    device: this process's. world_size: the number of processes. data_rank, data_world_size: which
    part of every global batch this process works on, and how many parts there are. is_writer:
    whether this process writes what a run has once (logger, status, plot).
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        """mesh: all processes of the run; None makes each of them a replica."""
        rank = session.rank()
        self.mesh = mesh or Mesh(replicate=session.world_size())
        self.device = session.device()
        self.world_size = self.mesh.world_size
        self.data_rank = self.mesh.data_rank(rank)
        self.data_world_size = self.mesh.data_world_size
        self.is_writer = rank == 0
        self._votes: Late | None = None

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int | None, compile: bool
    ) -> nn.Module:
        """Return the module that the loop calls, built from a model on the meta device.

        A subclass replaces parameters by this process's part of them, then calls this method. It
        allocates memory for them and fills it by `model.init_weights(seed)`, with the same numbers
        under every parallelism. seed: None leaves the parameters undefined, for weights that are
        read next. compile: torch.compile each block.
        """
        model.to_empty(device=self.device)
        if seed is None:
            reset_buffers(model)
        else:
            model.init_weights(seed)  # type: ignore[operator]
        if compile:
            # Blocks are alike: one compilation serves all. The modules are not compiled, so that
            # parameter names do not change and FSDP's hooks run outside the compiled region.
            for block in unwrap(model).units():
                block.forward = torch.compile(block.forward)
        return model

    def micro_step(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-step's forward and backward.

        When the context of the last one ends, gradients are complete over all micro-steps and data
        ranks.
        """
        session.set_phase("a micro-step")
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` (any shape, on the device) over all data ranks."""
        if self.data_world_size > 1:
            session.set_phase("summing metrics over the processes")
            values = values.contiguous().clone()
            dist.all_reduce(values)
        return values

    def vote(self, flag: bool) -> Tensor:
        """Return `flag` of this process as [] float64 on the device, to be summed with metrics."""
        # `full` fills it on the device; a tensor of a Python number would wait for the copy.
        return torch.full((), float(flag), dtype=torch.float64, device=self.device)

    def agree(self, flag: bool, votes: Tensor) -> bool:
        """Return whether any process wants to end the run; all call this once, after each step.

        votes: [] on the device, the sum over the processes of the flags of this step, which travels
        with its metrics. It is read after the next step, so that no step waits for it: all learn
        at the same step, the second after a process's flag was set at the latest.
        flag: of this process, which is the answer where there is no other.
        """
        if self.world_size == 1:
            session.end_first_step()
            return flag
        session.set_phase("the end of a step")
        before, self._votes = self._votes, Late(votes)
        if before is None:
            # Once in a run: the time limit is lowered when every process has done its first step.
            collectives.barrier()
            session.end_first_step()
            return False
        return before.read() > 0

    def gather(self, value: T) -> list[T]:
        """Return every process's (picklable) value, in the order of process ranks."""
        session.set_phase("gathering metrics of the processes")
        return collectives.gather_objects(value)


def unwrap(model: nn.Module) -> Transformer:
    """Return the Transformer inside what `wrap` returned: itself, for every parallelism here."""
    return cast("Transformer", model)


def sum_named(parallelism: Parallelism, totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over the data ranks of tensors of one dtype, made in one collective."""
    flat = parallelism.sum(torch.cat([part.reshape(-1) for part in totals.values()]))
    sums = flat.split([part.numel() for part in totals.values()])
    return {name: x.view_as(totals[name]) for name, x in zip(totals, sums, strict=True)}
