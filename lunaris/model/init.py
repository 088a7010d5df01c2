"""Weights drawn by name, the same numbers wherever a shard of them lives."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill a parameter of two or three dimensions with normal numbers, in place.

    They depend on (seed, name) and the shape alone: not on the device, nor on how the parameter is
    sharded (DTensor). Three dimensions are stacked experts, drawn one by one, so that an expert's
    numbers do not depend on how many there are; only those of this process's shard are.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    held = [_held(parameter, dim) for dim in range(parameter.ndim)]
    if parameter.ndim == 2:
        local.copy_(_cut(seeded_normal(parameter.shape, std, seed, name), *held))
        return
    for place, expert in enumerate(held[0].tolist()):
        drawn = seeded_normal(parameter.shape[1:], std, seed, f"{name}[{expert}]")
        local[place].copy_(_cut(drawn, *held[1:]))


def seeded_normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """Return float32 normal numbers on the CPU that depend on (seed, name) and the shape alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def _held(parameter: Tensor, dim: int) -> Tensor:
    """Return the indices along a dimension ([n] int64, CPU) that this process's shard holds.

    Found by sharding the indices as the parameter is: right for uneven shards and for a dimension
    that is sharded twice.
    """
    indices = torch.arange(parameter.size(dim))
    if not isinstance(parameter, DTensor):
        return indices
    shape = [1] * parameter.ndim
    shape[dim] = -1
    mesh = parameter.device_mesh
    placements = [
        p if getattr(p, "dim", None) == dim else Replicate() for p in parameter.placements
    ]
    indices = indices.view(shape).to(mesh.device_type)
    spread = distribute_tensor(indices, mesh, placements, src_data_rank=None)
    return spread.to_local().flatten().cpu()


def _cut(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the named rows and columns of a matrix, without a copy where it is all of them."""
    if len(rows) < matrix.size(0):
        matrix = matrix[rows]
    return matrix[:, columns] if len(columns) < matrix.size(1) else matrix
