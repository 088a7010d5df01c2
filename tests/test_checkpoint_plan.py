"""The plan of a checkpoint: torch's, checked in time linear in the number of processes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from math import prod

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lunaris import checkpoint_plan
from lunaris.checkpoint_plan import Planner, fault_of


def grid(*counts: int, of: tuple[int, ...]) -> list[ChunkStorageMetadata]:
    """Return the shards of a tensor of size `of` that is cut evenly, so often in each dimension."""
    sizes = [size // count for size, count in zip(of, counts, strict=True)]
    places = torch.cartesian_prod(*(torch.arange(count) for count in counts)).view(-1, len(counts))
    return [
        ChunkStorageMetadata(
            torch.Size(place * size for place, size in zip(row, sizes, strict=True)),
            torch.Size(sizes),
        )
        for row in places.tolist()
    ]


def shard(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    ("size", "shards"),
    [
        ((), [shard((), ())]),
        ((8, 6), grid(1, 1, of=(8, 6))),
        ((8, 6), grid(4, 3, of=(8, 6))),
        ((3, 8, 6), grid(3, 1, 2, of=(3, 8, 6))),
        # Uneven: the last processes hold less, and nothing.
        ((5, 2), [shard((0, 0), (3, 2)), shard((3, 0), (2, 2)), shard((5, 0), (0, 2))]),
    ],
)
def test_shards_that_make_up_a_tensor(
    size: tuple[int, ...], shards: list[ChunkStorageMetadata]
) -> None:
    assert fault_of(size, shards) is None
    assert fault_of(size, shards[::-1]) is None


@pytest.mark.parametrize(
    ("shards", "fault"),
    [
        ([shard((0, 0), (3, 2))], "hold 6 elements, not 8"),
        ([shard((0, 0), (3, 2)), shard((3, 0), (2, 2))], r"reach out of it: \[2, 2\] at \[3, 0\]"),
        ([shard((0, 0), (3, 2)), shard((2, 0), (1, 2))], r"overlap: \[1, 2\] at \[2, 0\] and"),
        ([shard((0, 0), (4, 1)), shard((1, 0), (2, 2))], "overlap"),
        ([], "hold 0 elements, not 8"),
    ],
)
def test_shards_that_do_not(shards: list[ChunkStorageMetadata], fault: str) -> None:
    found = fault_of((4, 2), shards)
    assert found is not None
    with pytest.raises(ValueError, match=fault):
        raise ValueError(found)


@pytest.mark.parametrize("counts", [(1024, 1), (1, 1024), (32, 32), (8, 128)])
def test_a_thousand_shards_are_compared_with_few_others(
    counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    overlap = checkpoint_plan._overlap

    def count(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
        nonlocal compared
        compared += 1
        return overlap(a, b)

    monkeypatch.setattr(checkpoint_plan, "_overlap", count)
    # The longest dimension is the second one, whichever is cut.
    assert fault_of((1024, 2048), grid(*counts, of=(1024, 2048))) is None
    assert compared <= 1024 * min(counts) // 2


def plans(processes: int) -> list[SavePlan]:
    """Return the plans of processes that hold a shard of `w` and of `v` each and a copy of `b`."""

    def item(name: str, size: tuple[int, ...], piece: ChunkStorageMetadata) -> WriteItem:
        data = TensorWriteData(piece, TensorProperties(), torch.Size(size))
        kind = WriteItemType.TENSOR if piece.sizes == data.size else WriteItemType.SHARD
        return WriteItem(MetadataIndex(name, piece.offsets), kind, tensor_data=data)

    size = (processes, 3 * processes)
    cuts = {"w": grid(processes, 1, of=size), "v": grid(1, processes, of=size)}
    return [
        SavePlan(
            [
                item("b", (4,), shard((0,), (4,))),
                *(item(name, size, pieces[rank]) for name, pieces in cuts.items()),
            ],
            planner_data={"b": ("model", "b"), "w": ("model", "w"), "v": ("model", "v")},
        )
        for rank in range(processes)
    ]


def test_plan_and_metadata_are_torchs() -> None:
    found = []
    for planner in (Planner(), DefaultSavePlanner()):
        planner.set_up_planner({}, None, is_coordinator=True)
        merged, metadata = planner.create_global_plan(plans(6))
        found.append((merged, pickle.dumps(metadata)))
        (piece,) = metadata.state_dict_metadata["b"].chunks
        assert prod(piece.sizes) == 4 and len(metadata.state_dict_metadata["w"].chunks) == 6
    assert found[0] == found[1]


def test_a_plan_that_lacks_a_shard_is_refused() -> None:
    given = plans(4)
    given[2] = replace(given[2], items=given[2].items[:2])
    planner = Planner()
    planner.set_up_planner({}, None, is_coordinator=True)
    with pytest.raises(ValueError, match=r"the shards of v \[4, 12\] hold 36 elements, not 48"):
        planner.create_global_plan(given)
