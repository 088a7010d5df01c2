"""The experts' product on GPUs without a fast `grouped_mm`: batched products of padded blocks.

Every shape follows from the number of rows, never from how they are routed, so that the host does
not wait for the device. No row is dropped: the blocks hold any routing (`lunaris.moe.blocks`).

Legend: T rows, D model width, H hidden width, E experts, C rows of a block, M blocks beyond each
expert's first, P = (E + M) · C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lunaris.moe.blocks import Blocks, blocks_for


def padded_product(
    x: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activate: Callable[[Tensor], Tensor],
    most: int | None = None,
) -> Tensor:
    """Return each row's expert's output ([T, D]) by batched products, without waiting for counts.

    x: [T, D], sorted by expert; counts: [E] int64 rows of each, T or fewer in all; rows past their
    sum give zeros. gate_up, down: as in `Experts`, in the dtype of x. most: rows that no expert
    exceeds; None: T.
    """
    blocks = blocks_for(len(x), len(gate_up), len(x) if most is None else min(most, len(x)))
    slot, source, owner = _places(counts, len(x), blocks)
    padded = _Regroup.apply(x, source, slot).unflatten(0, (-1, blocks.rows))  # [E + M, C, D]
    hidden = activate(_BlockProduct.apply(padded, gate_up, owner))
    out = _BlockProduct.apply(hidden, down, owner).flatten(0, 1)
    return _Regroup.apply(out, slot, source)


def _places(counts: Tensor, n_rows: int, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return where rows go (all int64): slot [T], source [P], owner [M].

    slot: each row's place among the P of all blocks, or P past the last expert's rows. source: the
    row in each place, or T for none. owner: the expert of each block beyond the first ones.
    """
    n_experts, size, device = len(counts), blocks.rows, counts.device
    total = blocks.total(n_experts)
    ends = counts.cumsum(0)
    more = (counts - 1).clamp_min(0) // size  # blocks beyond the first
    more_ends = more.cumsum(0)
    row = torch.arange(n_rows, device=device)
    expert = torch.searchsorted(ends, row, right=True)
    known = expert.clamp_max(n_experts - 1)
    place = row - (ends - counts)[known]
    # An expert's blocks beyond its first lie next to each other, after all first ones.
    first = known * size + place
    later = (n_experts - 1 + (more_ends - more)[known]) * size + place
    slot = torch.where(place < size, first, later)
    slot = torch.where(expert < n_experts, slot, total)
    source = torch.full((total + 1,), n_rows, device=device).scatter(0, slot, row)[:total]
    block = torch.arange(blocks.extra, device=device)
    # A block that no expert needs holds zeros; whose weights multiply them does not matter.
    owner = torch.searchsorted(more_ends, block, right=True).clamp_max(n_experts - 1)
    return slot, source, owner


class _Regroup(torch.autograd.Function):
    """Moves rows to other places; a place without a row is zero, a row without a place is left out.

    source: [R] the row of each place, or the number of rows for none; inverse: the place of each
    row, or R for none. Both directions gather, without atomic adds, so they are deterministic.
    Padding is written as zeros, never multiplied by zero, so that no NaN of it gets through.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows_or_zeros(x, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return _rows_or_zeros(grad, inverse), None, None


def _rows_or_zeros(x: Tensor, source: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.size(1))]).index_select(0, source)


class _BlockProduct(torch.autograd.Function):
    """Multiplies block i by the weights of expert i, and the blocks beyond by their owners'.

    x: [E + M, C, I]; weight: [E, I, O]; owner: [M]. Returns [E + M, C, O]. The copies of weights
    that the blocks beyond need are made again for the backward, not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, owner)
        return block_product(x, weight, owner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, owner = ctx.saved_tensors
        n_experts = len(weight)
        of_weight = torch.bmm(x[:n_experts].mT, grad[:n_experts])
        if len(owner):
            more = torch.bmm(x[n_experts:].mT, grad[n_experts:])
            # [E, M]: a product sums the blocks of an expert in one order, index_add in any.
            owned = owner == torch.arange(n_experts, device=owner.device)[:, None]
            of_weight.flatten(1).addmm_(owned.to(more.dtype), more.flatten(1))
        return block_product(grad, weight.mT, owner), of_weight, None


# An operator of this package, so that selective checkpointing can keep its result.
@torch.library.custom_op("lunaris::block_product", mutates_args=())
def block_product(x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    """Return the forward of `_BlockProduct`, with its shapes."""
    n_experts = len(weight)
    if not len(owner):
        return torch.bmm(x, weight)
    out = x.new_empty(*x.shape[:2], weight.size(2))
    torch.bmm(x[:n_experts], weight, out=out[:n_experts])
    torch.bmm(x[n_experts:], weight.index_select(0, owner), out=out[n_experts:])
    return out


@block_product.register_fake
def _(x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.size(2))
