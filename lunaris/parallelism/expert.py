"""Expert parallelism: each process of a group has a part of every layer's experts.

Every process still reads its own sequences: a layer sends each token to the process that has the
token's expert and gets the result back, by two all-to-all exchanges (GShard, arXiv 2006.16668,
section 3).

Legend: E experts, P processes of an expert group, T tokens of this process, R tokens it receives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lunaris.errors import UserError
from lunaris.model.layers import compute_dtype
from lunaris.model.roles import Role, modules_with


def shard_experts(model: nn.Module, mesh: DeviceMesh, compile: bool) -> None:
    """Shard every layer's experts over the one-dimensional `mesh`; the model is still on meta.

    Stacked weights [E, …] become DTensors sharded on the experts, so that checkpoints know the
    complete tensor. The module's forward, which computes E/P experts, is wrapped in the exchange.
    Raises UserError if P does not divide E.
    """
    parts, part = mesh.size(), mesh.get_local_rank()
    for experts in modules_with(model, Role.EXPERT):
        for name, parameter in list(experts.named_parameters(recurse=False)):
            count = parameter.size(0)
            if count % parts:
                raise UserError(
                    f"parallelism.expert_parallel={parts}: must divide moe.n_experts={count}"
                )
            local = parameter.detach().chunk(parts)[part]
            sharded = DTensor.from_local(local.contiguous(), mesh, [Shard(0)], run_check=False)
            experts.register_parameter(name, nn.Parameter(sharded))
        exchange = partial(_exchange, experts.forward, mesh.get_group())
        # Not compiled: its sizes change with every batch, and it runs collectives.
        experts.forward = torch.compiler.disable(exchange) if compile else exchange


@torch.no_grad()
def scale_expert_grads(model: nn.Module, factor: float) -> None:
    """Multiply the gradients of sharded experts by `factor`, in place.

    The gradient of an expert sums over the tokens of all processes of its group, other gradients
    over those of one process; `factor` turns such sums into the average over the data ranks.
    """
    found = [p.grad for m in modules_with(model, Role.EXPERT) for p in m.parameters()]
    grads = [grad.to_local() for grad in found if isinstance(grad, DTensor)]
    if grads:
        torch._foreach_mul_(grads, factor)


def _exchange(
    forward: Callable[..., Tensor],
    group: dist.ProcessGroup,
    x: Tensor,
    counts: Tensor,
    most: int | None = None,
) -> Tensor:
    """Return the experts' outputs [T, D] for tokens `x` [T, D] sorted by expert.

    forward: computes the local experts. counts: [E] tokens of each expert, T or fewer in all; rows
    past their sum give zeros. most: tokens of this process that no expert exceeds, or None for
    experts that do not ask. The host must know the sizes of the exchange, so this waits for the
    device once.
    """
    # [P, E/P]: row p has the numbers of tokens sent to, and received from, process p.
    sent = counts.view(dist.get_world_size(group), -1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    of_expert = received.sum(0)
    sizes = torch.cat([sent.sum(1), received.sum(1), of_expert.max()[None]]).tolist()
    send, receive, busiest = sizes[: len(sent)], sizes[len(sent) : -1], sizes[-1]

    rows = x[: sum(send)].to(compute_dtype(x))
    arrived = _AllToAll.apply(rows, receive, send, group)  # [R, D]
    order = _by_expert(received, len(arrived))
    # `most` says nothing of what other processes send; the largest load here is known exactly.
    known = () if most is None else (busiest,)
    out = forward(arrived.index_select(0, order), of_expert, *known)
    back = torch.empty_like(out).index_copy(0, order, out)
    mine = _AllToAll.apply(back, send, receive, group)
    return torch.cat([mine, mine.new_zeros(len(x) - len(mine), mine.size(1))])


def _by_expert(received: Tensor, total: int) -> Tensor:
    """Return the order [R] that sorts tokens from (process, expert) to (expert, process).

    received: [P, E/P] tokens from each process for each local expert; total: their sum, R.
    """
    experts = torch.arange(received.size(1), device=received.device).repeat(received.size(0))
    of_token = experts.repeat_interleave(received.reshape(-1).long(), output_size=total)
    return of_token.argsort(stable=True)


class _AllToAll(torch.autograd.Function):
    """Exchange rows between the processes of a group; the backward returns their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        out = grad.new_empty(sum(ctx.send), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None
