"""Parameters, gradients and optimizer state sharded (ZeRO-3), by torch's fully_shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lunaris.distributed import session as distributed
from lunaris.errors import UserError
from lunaris.model.roles import Role, parameters_in
from lunaris.parallelism.base import Parallelism, compile_blocks, materialize
from lunaris.parallelism.expert import (
    check_degree,
    expert_modules,
    scale_expert_grads,
    spread_experts,
)
from lunaris.precision import Precision


class FSDP(Parallelism):
    """Shards over all processes; a block's parameters are gathered while it computes.

    In bf16 and fp16 a block's matrices are cast before they are gathered, which halves the
    traffic; gradients are reduced in float32. What autocast reads in float32 stays so: embeddings
    and the head are gathered as they are; norms and routers inside blocks, a few thousandths of
    the parameters, are not sharded at all, since a gather of their own inside each block would
    cost more than it saves. The numbers are those of autocast without sharding.
    """

    def __init__(self, *, expert_parallel: int = 1, reshard_after_forward: bool = True) -> None:
        super().__init__()
        distributed.ensure_group()
        self._expert_parallel = expert_parallel
        self._reshard = reshard_after_forward
        self._replicated: list[nn.Parameter] = []

    def meshes(self) -> Meshes:
        """Return the meshes: of the experts, and of everything else."""
        check_degree(self._expert_parallel, self.world_size, "the number of processes")
        return Meshes.build(self.device.type, 1, self.world_size, self._expert_parallel)

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Shard the model, allocate this process's shards and draw their weights."""
        meshes = self.meshes()
        if meshes.expert is not None:
            spread_experts(model, meshes.expert, compile)
        if compile:
            compile_blocks(model)
        half = None if precision.dtype == torch.float32 else precision.dtype
        exact = set() if half is None else set(_read_exactly(model.blocks))  # type: ignore[arg-type]
        # Activations keep their dtype between blocks: autocast decides, as without sharding.
        inside = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        around = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in model.blocks:  # type: ignore[union-attr]
            if meshes.expert is not None:
                for experts in expert_modules(block):
                    _shard(experts, meshes.beside_experts, self._reshard, inside, exact)
            _shard(block, meshes.dense, self._reshard, inside, exact)
        # The root's are needed first in the backward, right after the forward.
        _shard(model, meshes.dense, False, around, exact)
        materialize(model, self.device, seed)
        if half is not None:
            self._replicated = _read_exactly(model.blocks)  # type: ignore[arg-type]
        return model

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Reduce gradients to shards in every micro-step: whole ones would not fit.

        Across replicas (HSDP) they are summed in the last one only.
        """
        assert isinstance(model, FSDPModule)
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
        with super().micro_step(model, last):
            yield
        if not last:
            return
        if self._replicated and self.world_size > 1:
            _average([p.grad for p in self._replicated if p.grad is not None], self.world_size)
        if self._expert_parallel > 1:
            scale_expert_grads(model, 1 / self._expert_parallel)


class HSDP(FSDP):
    """Shards within groups of `shard_size` processes and replicates across the groups.

    The gathers stay within a group (one machine, say); only gradients of shards cross.
    """

    def __init__(
        self,
        *,
        expert_parallel: int = 1,
        reshard_after_forward: bool = True,
        shard_size: int | None = None,
    ) -> None:
        """shard_size: None takes the processes of one machine."""
        super().__init__(
            expert_parallel=expert_parallel, reshard_after_forward=reshard_after_forward
        )
        self._shard_size = shard_size or distributed.local_world_size()

    def meshes(self) -> Meshes:
        """Return the meshes: of the experts, and of everything else."""
        size = self._shard_size
        if self.world_size % size:
            raise UserError(
                f"parallelism.shard_size={size}: must divide the {self.world_size} processes"
            )
        check_degree(self._expert_parallel, size, "parallelism.shard_size")
        return Meshes.build(self.device.type, self.world_size // size, size, self._expert_parallel)


class Meshes:
    """The device meshes of a sharded model.

    dense: [shards], or [replicas, shards]; what is not an expert. expert: [P] processes that share
    one set of experts, None without expert parallelism. beside_experts: the dimensions that are
    left, over which an expert's own tensors are sharded, and replicated.
    """

    def __init__(
        self, dense: DeviceMesh, expert: DeviceMesh | None, beside_experts: DeviceMesh
    ) -> None:
        self.dense = dense
        self.expert = expert
        self.beside_experts = beside_experts

    @classmethod
    def build(cls, device_type: str, replicas: int, shards: int, experts: int) -> Meshes:
        """Return the meshes of replicas × shards processes; neighbours share experts."""
        names: tuple[str, ...] = ("shard",)
        shape: tuple[int, ...] = (shards,)
        if replicas > 1:
            names, shape = ("replica", *names), (replicas, *shape)
        dense = init_device_mesh(device_type, shape, mesh_dim_names=names)
        if experts == 1:
            return cls(dense, None, dense)
        whole = init_device_mesh(
            device_type,
            (*shape[:-1], shards // experts, experts),
            mesh_dim_names=(*names, "expert"),
        )
        return cls(dense, whole["expert"], whole[names])


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    reshard: bool,
    policy: MixedPrecisionPolicy,
    left_whole: set[nn.Parameter],
) -> None:
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda parameter: _placement(parameter, mesh.size(-1)),
        mp_policy=policy,
        ignored_params=left_whole,
    )


def _read_exactly(blocks: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the blocks' routers and norms."""
    return parameters_in(blocks, Role.ROUTER | Role.NORM)


@torch.no_grad()
def _average(grads: list[Tensor], world_size: int) -> None:
    """Replace gradients by their averages over all processes, in one exchange."""
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])


def _placement(parameter: nn.Parameter, shards: int) -> Shard:
    """Return the dimension to shard: the first that divides evenly, else the first.

    Stacked experts that are spread over processes are cut along another dimension.
    """
    taken = {p.dim for p in getattr(parameter, "placements", ()) if isinstance(p, Shard)}
    for dim, size in enumerate(parameter.shape):
        if dim not in taken and size % shards == 0:
            return Shard(dim)
    return Shard(0)
