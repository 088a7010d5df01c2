"""The plan of a checkpoint: which process writes which shard, in time linear in the processes."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from lunaris.torch_internals import without_duplicates


class Planner(DefaultSavePlanner):
    """torch's planner of a save, with its plan and metadata, and a faster check of them.

    torch's compares the shards of a tensor with each other wherever they differ in another
    dimension than the tensor's longest: minutes at each save of a thousand processes.
    """

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Merge the plans of all processes; rank 0 calls this.

        Raises ValueError that names a tensor which the shards do not make up exactly.
        """
        plans, metadata = create_default_global_save_plan(without_duplicates(self, all_plans))
        names = dict(ChainMap(*(plan.planner_data for plan in plans)))
        self.global_plan, self.metadata = plans, replace(metadata, planner_data=names)
        for name, tensor in metadata.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata):
                fault = fault_of(tensor.size, tensor.chunks)
                if fault is not None:
                    raise ValueError(f"the shards of {name} {list(tensor.size)} {fault}")
        return plans, self.metadata


def fault_of(size: Sequence[int], shards: Sequence[ChunkStorageMetadata]) -> str | None:
    """Return why shards do not make up a tensor of a size exactly, or None where they do.

    They are looked at in the order of the dimension along which most of them differ, so that each
    is compared only with those that stand beside it there.
    """
    found = [shard for shard in shards if prod(shard.sizes)]
    for shard in found:
        ends = [a + n for a, n in zip(shard.offsets, shard.sizes, strict=True)]
        if min(shard.offsets, default=0) < 0 or any(e > n for e, n in zip(ends, size, strict=True)):
            return f"reach out of it: {_shown(shard)}"
    held, wanted = sum(prod(shard.sizes) for shard in found), prod(size)
    if held != wanted:
        return f"hold {held} elements, not {wanted}"
    if len(found) < 2:
        return None
    along = max(range(len(size)), key=lambda dim: len({shard.offsets[dim] for shard in found}))
    beside: list[ChunkStorageMetadata] = []
    for shard in sorted(found, key=lambda shard: shard.offsets[along]):
        start = shard.offsets[along]
        beside = [other for other in beside if other.offsets[along] + other.sizes[along] > start]
        for other in beside:
            if _overlap(shard, other):
                return f"overlap: {_shown(shard)} and {_shown(other)}"
        beside.append(shard)
    return None


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    ranges = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(i < j + m and j < i + n for i, n, j, m in ranges)


def _shown(shard: ChunkStorageMetadata) -> str:
    return f"{list(shard.sizes)} at {list(shard.offsets)}"
