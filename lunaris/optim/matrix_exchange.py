"""A function of every matrix of parameters, each sharded one computed by one of its processes.

Legend: N matrices [R, C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# Takes [N, R, C] and computes each matrix by itself; returns float32.
MatrixFunction = Callable[[Tensor], Tensor]


class Part(NamedTuple):
    """This process's part of a parameter's matrices.

    values: [..., R, C], or fewer rows or columns where `dim` (-2 or -1) is sharded over the
    processes of `group`; `length` is then the size of `dim` in all of them. Sharded leading
    dimensions leave a process with whole matrices: `group` is None.
    """

    values: Tensor
    group: dist.ProcessGroup | None = None
    dim: int = -2
    length: int = 0


def part_of(parameter: Tensor, values: Tensor) -> Part:
    """Return `values`, local numbers of `parameter`, with how its matrices are sharded.

    Raises NotImplementedError for matrices sharded along two dimensions of a mesh.
    """
    if not isinstance(parameter, DTensor):
        return Part(values)
    mesh = parameter.device_mesh
    found = [
        Part(values, mesh.get_group(i), p.dim - parameter.ndim, parameter.size(p.dim))
        for i, p in enumerate(parameter.placements)
        if isinstance(p, Shard) and p.dim >= parameter.ndim - 2 and mesh.size(i) > 1
    ]
    if len(found) > 1:
        raise NotImplementedError("Muon takes matrices sharded along one mesh dimension at most")
    return found[0] if found else Part(values)


def map_matrices(function: MatrixFunction, parts: Sequence[Part], at_once: int) -> list[Tensor]:
    """Return `function` of every matrix, as this process's parts of the results.

    at_once: `function` gets matrices of one shape together up to so many elements, and a whole
    part in any case.

    Sharded matrices are divided among their processes by the work they make; for each process group
    one exchange brings them together and one returns the results.
    """
    of_group: dict[dist.ProcessGroup | None, list[int]] = {}
    for i, part in enumerate(parts):
        of_group.setdefault(part.group, []).append(i)
    results: dict[int, Tensor] = {}
    for group, indices in of_group.items():
        mine = [parts[i] for i in indices]
        if group is None:
            computed = _in_batches(function, [part.values for part in mine], at_once)
        else:
            computed = _exchanged(function, mine, group, at_once)
        results |= zip(indices, computed, strict=True)
    return [results[i] for i in range(len(parts))]


def _in_batches(function: MatrixFunction, tensors: Sequence[Tensor], at_once: int) -> list[Tensor]:
    """Return `function` of every tensor [..., R, C], those of one shape together."""
    stacks = [_stack(tensor) for tensor in tensors]
    batches: dict[torch.Size, list[list[int]]] = {}
    for i, stack in enumerate(stacks):
        of_shape = batches.setdefault(stack.shape[1:], [[]])
        if of_shape[-1] and stack.numel() + sum(stacks[j].numel() for j in of_shape[-1]) > at_once:
            of_shape.append([])
        of_shape[-1].append(i)
    results: dict[int, Tensor] = {}
    for batch in (batch for of_shape in batches.values() for batch in of_shape):
        together = [stacks[i] for i in batch]
        out = function(torch.cat(together) if len(batch) > 1 else together[0])
        results |= zip(batch, out.split([len(stack) for stack in together]), strict=True)
    return [results[i].view(tensor.shape) for i, tensor in enumerate(tensors)]


class _Matrix(NamedTuple):
    """A matrix of `part`, the one at `position` of its leading dimensions made one."""

    part: int
    position: int
    shape: tuple[int, int]
    # Its part in each process, as torch's `chunk` cuts.
    cut: list[tuple[int, int]]
    dim: int


def _exchanged(
    function: MatrixFunction, parts: Sequence[Part], group: dist.ProcessGroup, at_once: int
) -> list[Tensor]:
    """Return `function` of every matrix of the parts, which `group` shares, by two exchanges."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    stacks = [_stack(part.values) for part in parts]
    owned = _divide(list(_matrices(parts, stacks, world)), world)
    mine, order = owned[rank], [m for theirs in owned for m in theirs]
    # Numbers to and from each process, once to the owners and once back.
    out = [sum(_numel(m.cut[rank]) for m in theirs) for theirs in owned]
    into = [sum(_numel(m.cut[source]) for m in mine) for source in range(world)]

    send = [stacks[m.part][m.position].reshape(-1) for m in order]
    arrived = _all_to_all(torch.cat(send), into, out, group).split(into)
    shards = [
        values.split([_numel(m.cut[source]) for m in mine]) for source, values in enumerate(arrived)
    ]
    whole = [
        torch.cat([shards[s][i].view(m.cut[s]) for s in range(world)], dim=m.dim)
        for i, m in enumerate(mine)
    ]
    computed = _in_batches(function, whole, at_once)
    back = [
        result.split([shape[m.dim] for shape in m.cut], dim=m.dim)
        for m, result in zip(mine, computed, strict=True)
    ]
    returned = [cut[s].reshape(-1) for s in range(world) for cut in back]
    empty = stacks[0].new_empty(0, dtype=torch.float32)
    values = _all_to_all(torch.cat([empty, *returned]), out, into, group)
    results = [torch.empty_like(stack, dtype=torch.float32) for stack in stacks]
    sizes = [_numel(m.cut[rank]) for m in order]
    for m, result in zip(order, values.split(sizes), strict=True):
        results[m.part][m.position] = result.view(m.cut[rank])
    return [r.view(part.values.shape) for r, part in zip(results, parts, strict=True)]


def _matrices(parts: Sequence[Part], stacks: Sequence[Tensor], world: int) -> Iterator[_Matrix]:
    for i, (part, stack) in enumerate(zip(parts, stacks, strict=True)):
        step = -(-part.length // world)
        sizes = [min(step, max(0, part.length - r * step)) for r in range(world)]
        rows, columns = stack.shape[-2:]
        if part.dim == -2:
            shape, cut = (part.length, columns), [(size, columns) for size in sizes]
        else:
            shape, cut = (rows, part.length), [(rows, size) for size in sizes]
        yield from (_Matrix(i, j, shape, cut, part.dim) for j in range(len(stack)))


def _divide(matrices: list[_Matrix], world: int) -> list[list[_Matrix]]:
    """Return each process's matrices: the most work first, to the process with the least."""
    owned: list[list[_Matrix]] = [[] for _ in range(world)]
    load = [0] * world
    for matrix in sorted(matrices, key=_work, reverse=True):
        least = load.index(min(load))
        owned[least].append(matrix)
        load[least] += _work(matrix)
    return owned


def _stack(tensor: Tensor) -> Tensor:
    return tensor.reshape(prod(tensor.shape[:-2]), *tensor.shape[-2:])


def _work(matrix: _Matrix) -> int:
    return _numel(matrix.shape) * min(matrix.shape)


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _all_to_all(
    values: Tensor, into: list[int], out: list[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = values.new_empty(sum(into))
    dist.all_to_all_single(arrived, values, into, out, group=group)
    return arrived
