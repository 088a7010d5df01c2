"""Averages gradients over the processes that share a parameter while the backward still runs.

torch's DistributedDataParallel changes the order of its buckets after the first backward. The
second step then adds up in another order than the first step after a resume does, and more than
two processes do not resume bit for bit. Here the buckets never change. Replicas on a device mesh
(`fully_shard` or `replicate`) are exact too, but slower and larger: tests/benchmarks/ddp.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lunaris.model.layers import local_part

_BUCKET_BYTES = 25 << 20


@dataclass
class _Bucket:
    """Parameters whose gradients are summed in one all-reduce over the processes of `group`."""

    group: dist.ProcessGroup | None
    parameters: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = field(default=None, repr=False)


class Reducer:
    """Averages the gradients of `parameters` over all processes, one bucket at a time.

    A DTensor is a part of a parameter that other processes have as well: its gradient is summed
    over the group `sharers` and divided by the number of all processes.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], sharers: dist.ProcessGroup | None = None
    ) -> None:
        """sharers: the processes with the same parts of DTensors; None where no DTensor is."""
        # The backward computes the last layers' gradients first.
        self._buckets = _fill_buckets(list(parameters)[::-1], sharers)
        self._of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._next = len(self._buckets)
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """Average the gradients of the backward that comes next."""
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Wait for the all-reduces; gradients are views of their buckets afterwards."""
        while self._next < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            assert bucket.work is not None and bucket.flat is not None
            bucket.work.wait()
            bucket.flat /= dist.get_world_size()
            bucket.work = bucket.flat = None

    def _arrived(self, parameter: nn.Parameter) -> None:
        self._of[parameter].missing -= 1
        # Every process must launch the buckets in the same order, whichever is complete first:
        # those of two groups as well, since NCCL may block when their orders differ.
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        grads = [
            local_part(torch.zeros_like(p) if p.grad is None else p.grad) for p in bucket.parameters
        ]
        flat = [grad.detach().reshape(-1) for grad in grads]
        # The experts of a layer may be a bucket of their own, which needs no copy.
        bucket.flat = torch.cat(flat) if len(flat) > 1 else flat[0]
        # Gradients become views, which frees their memory while others are still computed.
        parts = bucket.flat.split([grad.numel() for grad in grads])
        for parameter, grad, part in zip(bucket.parameters, grads, parts, strict=True):
            parameter.grad = _like(parameter, part.view_as(grad))
        bucket.work = dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """Return `local`, this process's part of a gradient, as the gradient of `parameter`."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(local, mesh, placements, run_check=False)
    return local


def _fill_buckets(
    parameters: list[nn.Parameter], sharers: dist.ProcessGroup | None
) -> list[_Bucket]:
    """Return buckets of one dtype and one group each, in the order in which they are complete.

    parameters: in the order of their gradients.
    """
    open_ones: dict[tuple[torch.dtype, bool], tuple[_Bucket, int]] = {}
    last: dict[int, tuple[int, _Bucket]] = {}
    for at, parameter in enumerate(parameters):
        part = isinstance(parameter, DTensor)
        size = local_part(parameter).numel() * parameter.element_size()
        bucket, room = open_ones.get((parameter.dtype, part), (None, 0))
        if bucket is None or size > room:
            bucket, room = _Bucket(sharers if part else None), _BUCKET_BYTES
        bucket.parameters.append(parameter)
        open_ones[parameter.dtype, part] = (bucket, room - size)
        last[id(bucket)] = (at, bucket)
    return [bucket for _, bucket in sorted(last.values(), key=lambda found: found[0])]
