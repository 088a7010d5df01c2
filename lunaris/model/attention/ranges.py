"""Attention of each position to a range of positions, without a mask of all pairs in memory.

The range of a position begins at the first position that it attends to, which does not decrease
along a sequence, and ends at itself: that is what documents and windows amount to. On a CPU blocks
of queries are computed one after another, on a GPU by FlexAttention (arXiv 2412.05496).

Shapes: B sequences, L positions, S keys (L, or L + 1 with a sink), H heads, G key-value heads,
K width of queries, keys and values.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from lunaris.model.attention.base import Positions
from lunaris.torch_internals import cpu_attention, cpu_attention_backward

# Queries of a block on a CPU: its mask and its scores are this times S, at most.
_QUERIES = 256
# Of FlexAttention's blocks, in both directions.
_BLOCK = 128


def first_attended(positions: Positions, window: int | None = None) -> Tensor | None:
    """Return the first position that each attends to ([B, L], or [1, L] without documents; int64).

    window: how many positions are attended at most, the position itself included. None where every
    position attends to all up to itself.
    """
    assert positions.start == 0
    documents, end = positions.documents, positions.end
    if documents is None and (window is None or end <= window):
        return None

    def make() -> Tensor:
        at = torch.arange(end, device=positions.device)[None]
        first = torch.zeros_like(at) if window is None else (at - window + 1).clamp_min(0)
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            first = torch.maximum(first, (at * begins).cummax(dim=1).values)
        return first

    return positions.shared(("first_attended", window), make)


def ranges_mask(first: Tensor) -> Tensor:
    """Return the ranges that begin at `first` ([B, L]) as a mask ([B, 1, L, L] bool)."""
    at = torch.arange(first.size(1), device=first.device)
    return ((at >= first[:, :, None]) & (at <= at[:, None]))[:, None]


def has_kernel(device: torch.device, width: int) -> bool:
    """Return whether `attend_ranges` has a kernel for a device and a head width.

    Any CPU has; a GPU where Triton can compile FlexAttention, whose heads have 16 columns or more.
    """
    return _takes_blocks(device) or (device.type == "cuda" and width >= 16 and _compiles(device))


@torch.compiler.assume_constant_result
def _compiles(device: torch.device) -> bool:
    """Return whether Triton is installed, takes the GPU, and finds the C compiler that it needs."""
    return torch.cuda.get_device_capability(device) >= (7, 0) and _triton_is_complete()


@functools.cache
def _triton_is_complete() -> bool:
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    return find_spec("triton") is not None and any(shutil.which(c) for c in compilers if c)


def _takes_blocks(device: torch.device) -> bool:
    return device.type == "cpu"


def attend_ranges(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, *, scale: float, sink: bool
) -> Tensor:
    """Return softmax(scale · q kᵀ) v ([B, H, L, K]) over each position's range.

    q: [B, H, L, K]; k, v: [B, G, S, K]; first: as of `first_attended`. sink: there is a key before
    the first one, to which all positions attend.
    """
    if _takes_blocks(q.device):
        out: Tensor = _in_blocks(q, k, v, first, scale, sink)[0]
        return out
    # Without compilation it computes all scores; within a compiled block it is compiled with it.
    run = _flex if torch.compiler.is_compiling() else _compiled_flex()
    return run(q, k, v, block_mask(first, sink), scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, table: flex.BlockMask, scale: float) -> Tensor:
    out: Any = flex.flex_attention(
        q, k, v, block_mask=table, scale=scale, enable_gqa=q.size(1) > k.size(1)
    )
    result: Tensor = out
    return result


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(_flex, dynamic=False)


def block_mask(first: Tensor, sink: bool) -> flex.BlockMask:
    """Return FlexAttention's table of the blocks that have a pair within the ranges.

    It follows from the first and the last query of each block, so that no pair is looked at.
    """
    length, shift = first.size(1), int(sink)
    first = first + shift  # As an index of keys.
    begin = torch.arange(0, length, _BLOCK, device=first.device)
    last = (begin + _BLOCK - 1).clamp_max(length - 1)
    keys = torch.arange(0, length + shift, _BLOCK, device=first.device)
    reached = keys <= last[:, None] + shift
    some = reached & (keys + _BLOCK > first[:, begin, None])
    full = (keys >= first[:, last, None]) & (keys + _BLOCK - 1 <= begin[:, None] + shift)
    if sink:
        some = some | (keys == 0)

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = first[b] if first.size(0) > 1 else first[0]
        ranges = (k >= row[q]) & (k <= q + shift)
        return (ranges | (k == 0)) if sink else ranges

    return flex.BlockMask.from_kv_blocks(
        *_counted(some & ~full),
        *_counted(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=inside,
        seq_lengths=(length, length + shift),
    )


def _counted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of each row are true, and their indices first ([B, 1, …] int32)."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


# Operators of this package: they read where the ranges begin, which would break a compiled block's
# graph, and selective checkpointing keeps their results (`lunaris.model.recompute`).
@torch.library.custom_op("lunaris::attend_in_blocks", mutates_args=())
def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, sink: bool
) -> tuple[Tensor, Tensor]:
    """Return the output of `attend_ranges` and the logarithms of the softmax's sums ([B, H, L])."""
    out, sums = _results(q)
    for rows, keys, mask in _blocks(q, first, sink):
        out[:, :, rows], sums[:, :, rows] = cpu_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], mask, scale
        )
    return out, sums


@_in_blocks.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, sink: bool
) -> tuple[Tensor, Tensor]:
    return _results(q)


@torch.library.custom_op("lunaris::attend_in_blocks_backward", mutates_args=())
def _in_blocks_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    first: Tensor,
    scale: float,
    sink: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, mask in _blocks(q, first, sink):
        inputs = (q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], sums[:, :, rows])
        parts = cpu_attention_backward(grad[:, :, rows], inputs, mask, scale)
        grad_q[:, :, rows] = parts[0]
        grad_k[:, :, keys] += parts[1]
        grad_v[:, :, keys] += parts[2]
    return grad_q, grad_k, grad_v


@_in_blocks_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first, ctx.scale, ctx.sink = inputs
    ctx.save_for_backward(q, k, v, *output, first)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = _in_blocks_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.sink)
    return *grads, None, None, None


_in_blocks.register_autograd(_backward, setup_context=_keep)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for the output, laid out as [B, L, H, K], and for the sums."""
    sequences, heads, length, width = q.shape
    out = q.new_empty(sequences, length, heads, width).transpose(1, 2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out, q.new_empty(sequences, heads, length, dtype=dtype)


def _blocks(q: Tensor, first: Tensor, sink: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the queries of each block, the keys that any of them attends to, and their mask.

    The mask ([B or 1, 1, queries, keys], in the dtype of q) is added to the scores.
    """
    length, shift = first.size(1), int(sink)
    for begin in range(0, length, _QUERIES):
        end = min(begin + _QUERIES, length)
        lowest = 0 if sink else int(first[:, begin].min())
        at = torch.arange(lowest, end)
        inside = (at >= first[:, begin:end, None]) & (at <= torch.arange(begin, end)[:, None])
        inside = F.pad(inside, (shift, 0), value=True)[:, None]
        mask = torch.zeros(inside.shape, dtype=q.dtype).masked_fill_(~inside, -torch.inf)
        yield slice(begin, end), slice(lowest, end + shift), mask
