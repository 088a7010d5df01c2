"""Averages replicated gradients over processes while the backward is still running.

torch's DistributedDataParallel changes the order of its buckets after the first backward. The
second step then adds up in another order than the first step after a resume does, and more than
two processes do not resume bit for bit. Here the buckets never change. Replicas on a device mesh
(`fully_shard` or `replicate`) are exact too, but slower and larger: tests/benchmarks/ddp.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 << 20


@dataclass
class _Bucket:
    """Parameters whose gradients are averaged in one all-reduce."""

    parameters: list[nn.Parameter]
    missing: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = field(default=None, repr=False)


class Reducer:
    """Averages the gradients of `parameters` over all processes, one bucket at a time."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # The backward computes the last layers' gradients first.
        self._buckets = _fill_buckets(parameters[::-1])
        self._of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._next = len(self._buckets)
        for parameter in parameters:
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
        # Every process must launch the buckets in the same order, whichever is complete first.
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters]
        bucket.flat = torch.cat([grad.detach().reshape(-1) for grad in grads])
        # Gradients become views, which frees their memory while others are still computed.
        parts = bucket.flat.split([grad.numel() for grad in grads])
        for parameter, part in zip(bucket.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _fill_buckets(parameters: list[nn.Parameter]) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if size > room or parameter.dtype != buckets[-1].parameters[0].dtype:
            buckets.append(_Bucket([]))
            room = _BUCKET_BYTES
        buckets[-1].parameters.append(parameter)
        room -= size
    return buckets
