"""The mesh: a run's processes as a grid with named dimensions, which every parallelism reads.

Data parallelism of any kind is a choice of sizes: DDP has `replicate` processes, FSDP `shard`, HSDP
both; `expert` is part of either. Torch is imported only where a device mesh is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunaris.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """The number of processes along each dimension, the outermost first.

    Ranks count along the innermost dimension first, so its processes are neighbours.

    replicate: replicas of the model, which exchange gradients only. shard: processes that share
    one replica, each with a part of every parameter. expert: processes that share one set of
    experts; in all other parameters they count as replicas if `shard` is 1 and as shards if not.
    context, tensor: processes that work on the same sequences (always 1 today).
    """

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def replicated(cls, processes: int, expert_parallel: int) -> Mesh:
        """Return the mesh of DDP. Raises UserError if the degree does not divide `processes`."""
        _check_divides(
            "parallelism.expert_parallel", expert_parallel, "the number of processes", processes
        )
        return cls(replicate=processes // expert_parallel, expert=expert_parallel)

    @classmethod
    def sharded(cls, processes: int, expert_parallel: int, shard_size: int | None = None) -> Mesh:
        """Return the mesh of FSDP, or with a `shard_size` (processes of a replica) that of HSDP.

        Raises UserError if `shard_size` does not divide `processes`, or `expert_parallel` does not
        divide `shard_size`.
        """
        divided = "the number of processes" if shard_size is None else "parallelism.shard_size"
        size = processes if shard_size is None else shard_size
        _check_divides("parallelism.shard_size", size, "the number of processes", processes)
        _check_divides("parallelism.expert_parallel", expert_parallel, divided, size)
        return cls(processes // size, size // expert_parallel, expert_parallel)

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.data_world_size * self.context * self.tensor

    @property
    def data_world_size(self) -> int:
        """The number of data ranks: the parts into which a global batch is split."""
        return self.replicate * self.shard * self.expert

    def data_rank(self, rank: int) -> int:
        """Return which part of every global batch process `rank` works on."""
        return rank // (self.context * self.tensor)

    def device_mesh(self, device_type: str, *names: str) -> DeviceMesh:
        """Return torch's mesh of all processes with the dimensions `names`, outermost first.

        A group of processes is made for each of them; dimensions left out must have size 1.
        """
        from torch.distributed.device_mesh import init_device_mesh

        shape = tuple(getattr(self, name) for name in names)
        return init_device_mesh(device_type, shape, mesh_dim_names=names)

    def sharded_meshes(self, device_type: str) -> ShardedMeshes:
        """Return the parts of the mesh over which FSDP and HSDP shard."""
        replicate = ("replicate",) if self.replicate > 1 else ()
        merged = Mesh(self.replicate, self.shard * self.expert)
        dense = merged.device_mesh(device_type, *replicate, "shard")
        if self.expert == 1:
            return ShardedMeshes(dense, expert=None, within_expert=dense)
        from lunaris.torch_internals import split_dimension

        mesh = split_dimension(dense, "shard", {"shard": self.shard, "expert": self.expert})
        return ShardedMeshes(dense, mesh["expert"], mesh[(*replicate, "shard")])


@dataclass(frozen=True)
class ShardedMeshes:
    """The parts of one mesh that a sharded model uses.

    dense: [replicate, shard · expert], or without replicas [shard · expert]: all parameters that
    are not experts. expert: [expert], None without expert parallelism: which experts a process has.
    within_expert: [replicate, shard] or [shard]: an expert's own tensors.
    """

    dense: DeviceMesh
    expert: DeviceMesh | None
    within_expert: DeviceMesh


def _check_divides(key: str, value: int, divided: str, size: int) -> None:
    if size % value:
        raise UserError(f"{key}={value}: must divide {divided}, which is {size}")
