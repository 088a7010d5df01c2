"""Initial weights, drawn by parameter name, so that they do not depend on the sharding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lunaris.model.layers import local_part
from lunaris.model.roles import Role, parameter_roles

STD = 0.02


@torch.no_grad()
def init_weights(
    model: nn.Module,
    seed: int,
    n_layers: int,
    *,
    width: float = 1.0,
    without: Collection[str] = (),
) -> None:
    """Draw the parameters of `model` by their roles, in place, and reset every buffer.

    width: `WidthFactors.width`. without: names of parameters that are left as they are, because
    they are read from a file.

    Norms are 1, biases 0; everything else is normal with standard deviation 0.02, or
    0.02/√(2·n_layers) where it writes to the residual stream, over `width_divisor`. The numbers
    depend on the seed and the parameter's name, not on the device or the sharding. One matrix is
    drawn at a time, on the CPU; a process draws none of which it holds no part, also of stacked
    experts.
    """
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if name in without:
            continue
        if roles[name] & (Role.NORM | Role.BIAS):
            local_part(parameter).fill_(1.0 if Role.NORM in roles[name] else 0.0)
            continue
        std = STD / width_divisor(roles[name], width)
        if Role.RESIDUAL_OUTPUT in roles[name]:
            std = std / math.sqrt(2 * n_layers)
        fill_normal(parameter, std, seed, name)
    reset_buffers(model)


def width_divisor(role: Role, width: float) -> float:
    """Return what the standard deviation of initial weights is divided by at a relative width.

    Matrices within the blocks, experts too: √width, so that their variance falls with the number of
    their inputs. Routers, whose outputs do not grow in number, as the output weights of arXiv
    2203.03466 (table 3) and 2508.09752: width. Embeddings: 1.
    """
    if role & Role.ROUTER:
        return width
    return math.sqrt(width) if role & (Role.MATRIX | Role.EXPERT) else 1.0


@torch.no_grad()
def reset_buffers(model: nn.Module) -> None:
    """Reset every buffer of `model`: a module with buffers fills them in its `reset_buffers()`."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
        # Memory that `to_empty` allocates holds anything.
        assert reset is not None or not any(True for _ in module.buffers(recurse=False)), (
            f"{type(module).__name__} has buffers and no reset_buffers()"
        )


def fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill a parameter of two or three dimensions with normal numbers, in place.

    They depend on (seed, name) and the shape alone: not on the device, nor on how the parameter is
    sharded (DTensor). Three dimensions are stacked matrices (experts), drawn one by one: the
    numbers of one do not depend on how many there are, and a process draws only those of its shard.
    """
    if local_part(parameter).numel() == 0:
        return
    if parameter.ndim == 2:
        copy_to_shard(parameter, seeded_normal(parameter.shape, std, seed, name))
        return
    shape = parameter.shape[1:]
    fill_experts(parameter, lambda index: seeded_normal(shape, std, seed, f"{name}[{index}]"))


def fill_experts(stacked: Tensor, matrix_of: Callable[[int], Tensor]) -> None:
    """Fill this process's shard of stacked experts ([E, …]) in place.

    matrix_of: returns the complete matrix of an expert, on the CPU; called only for those that this
    process holds a part of.
    """
    local = local_part(stacked)
    indices = [_local_indices(stacked, dim) for dim in range(stacked.ndim)]
    for place, index in enumerate(indices[0].tolist()):
        local[place].copy_(_cut(matrix_of(index), indices[1:]))


def copy_to_shard(target: Tensor, full: Tensor) -> None:
    """Copy this process's part of a complete tensor into its shard of `target`, in place.

    full: of the shape of `target`, or with fewer rows, which are copied to the first ones.
    """
    local = local_part(target)
    indices = [_local_indices(target, dim) for dim in range(target.ndim)]
    inside = indices[0] < full.size(0) if target.ndim else None
    if inside is None or bool(inside.all()):
        local.copy_(_cut(full, indices))
    elif bool(inside.any()):
        rows = inside.nonzero().flatten().to(local.device)
        part = _cut(full, [indices[0][inside], *indices[1:]]).to(local)
        local.index_copy_(0, rows, part)


def seeded_normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """Return float32 normal numbers on the CPU that depend on (seed, name) and the shape alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def _local_indices(parameter: Tensor, dim: int) -> Tensor:
    """Return the indices along a dimension ([n] int64, CPU) that this process's shard holds.

    It shards the indices in the same way as the parameter, which is right for uneven shards and for
    a dimension that is sharded twice.
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
    sharded = distribute_tensor(indices, mesh, placements, src_data_rank=None)
    return sharded.to_local().flatten().cpu()


def _cut(tensor: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return some indices of each dimension, without a copy where they are all of them."""
    for dim, chosen in enumerate(indices):
        if len(chosen) < tensor.size(dim):
            tensor = tensor.index_select(dim, chosen)
    return tensor
