"""Sharded data parallelism (ZeRO-3) by torch's fully_shard, with and without replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lunaris.distributed import session
from lunaris.distributed.mesh import Mesh
from lunaris.model.roles import Role, modules_with, parameters_in
from lunaris.parallelism.base import Parallelism, unwrap
from lunaris.parallelism.expert import scale_expert_grads, shard_experts
from lunaris.precision import Precision


class FSDP(Parallelism):
    """Shards parameters, gradients and optimizer state over all processes.

    A block's parameters are gathered while it computes. In bf16 and fp16 its matrices are cast
    before they are gathered, which halves the traffic; gradients are reduced in float32. Parameters
    that autocast reads in float32 are not cast: embeddings and the head are gathered in float32;
    norms, biases and routers inside blocks, a few thousandths of the parameters, are not sharded at
    all, since a separate gather of them in each block would cost more than it saves. The numbers
    are those of autocast without sharding.
    """

    def __init__(
        self,
        *,
        expert_parallel: int = 1,
        reshard_after_forward: bool = True,
        shard_size: int | None = None,
    ) -> None:
        """shard_size: processes of a replica; None makes one replica of all.

        Raises UserError if it does not divide the number of processes, or `expert_parallel` does
        not divide the processes of a replica.
        """
        super().__init__(Mesh.sharded(session.world_size(), expert_parallel, shard_size))
        session.ensure_group()
        self._reshard = reshard_after_forward
        self._replicated: list[nn.Parameter] = []

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int | None, compile: bool
    ) -> nn.Module:
        """Shard the model, allocate this process's shards and, with a seed, draw their weights."""
        meshes = self.mesh.sharded_meshes(self.device.type)
        if meshes.expert is not None:
            shard_experts(model, meshes.expert, compile)
        half = None if precision.dtype == torch.float32 else precision.dtype
        units = unwrap(model).units()
        exact = set() if half is None else set(_read_exactly(units))
        # Autocast decides the dtype of activations between blocks, as without sharding.
        inside = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        around = MixedPrecisionPolicy(cast_forward_inputs=False)

        def shard(
            module: nn.Module, mesh: DeviceMesh, reshard: bool, policy: MixedPrecisionPolicy
        ) -> None:
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=reshard,
                shard_placement_fn=lambda parameter: _placement(parameter, mesh.size(-1)),
                mp_policy=policy,
                ignored_params=exact,
            )

        for block in units:
            if meshes.expert is not None:
                for experts in modules_with(block, Role.EXPERT):
                    shard(experts, meshes.within_expert, self._reshard, inside)
            shard(block, meshes.dense, self._reshard, inside)
        # The root's parameters stay gathered: the backward, which follows, needs them first.
        shard(model, meshes.dense, False, around)
        model = super().wrap(model, precision=precision, seed=seed, compile=compile)
        if half is not None:
            self._replicated = _read_exactly(units)
        return model

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Reduce gradients to shards in every micro-step, since complete ones may not fit.

        Across replicas (HSDP) they are summed in the last micro-step only.
        """
        assert isinstance(model, FSDPModule)
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
        with super().micro_step(model, last):
            yield
        if not last:
            return
        if self._replicated and self.data_world_size > 1:
            _average([p.grad for p in self._replicated if p.grad is not None], self.data_world_size)
        if self.mesh.expert > 1:
            scale_expert_grads(model, 1 / self.mesh.expert)


class HSDP(FSDP):
    """Shards within groups of `shard_size` processes and replicates across the groups.

    Parameters are gathered within a group (of one machine, for example); only the gradients of
    shards are exchanged across groups.
    """

    def __init__(self, *, shard_size: int | None = None, **keys: Any) -> None:
        """shard_size: None takes the processes of one machine. keys: as for FSDP."""
        super().__init__(shard_size=shard_size or session.local_world_size(), **keys)


def _read_exactly(units: list[nn.Module]) -> list[nn.Parameter]:
    """Return what autocast reads in float32: the blocks' routers, norms and biases."""
    return parameters_in(nn.ModuleList(units), Role.ROUTER | Role.NORM | Role.BIAS)


@torch.no_grad()
def _average(grads: list[Tensor], world_size: int) -> None:
    """Average gradients over all processes, in place and in one all-reduce."""
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])


def _placement(parameter: nn.Parameter, shards: int) -> Shard:
    """Return the dimension to shard: the first that divides evenly, else the first.

    Experts that are sharded over processes already are sharded along another dimension here.
    """
    taken = {p.dim for p in getattr(parameter, "placements", ()) if isinstance(p, Shard)}
    for dim, size in enumerate(parameter.shape):
        if dim not in taken and size % shards == 0:
            return Shard(dim)
    return Shard(0)
