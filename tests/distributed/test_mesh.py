"""The mesh: sizes, names, which ranks stand together, and what is refused; no real group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lunaris.distributed.mesh import Mesh
from lunaris.errors import UserError

_RANK = 5


@pytest.fixture
def group_of_eight() -> Iterator[None]:
    """Make a fake group in which this process has rank 5 of 8."""
    dist.init_process_group("fake", store=FakeStore(), rank=_RANK, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (Mesh(), (1, 1, 1)),
        (Mesh.replicated(8, 1), (8, 1, 1)),
        (Mesh.replicated(8, 4), (2, 1, 4)),
        (Mesh.sharded(8, 1), (1, 8, 1)),
        (Mesh.sharded(8, 2), (1, 4, 2)),
        (Mesh.sharded(8, 1, 4), (2, 4, 1)),
        (Mesh.sharded(8, 2, 4), (2, 2, 2)),
        (Mesh.sharded(8, 1, 1), (8, 1, 1)),
    ],
)
def test_every_parallelism_is_a_choice_of_sizes(mesh: Mesh, sizes: tuple[int, ...]) -> None:
    assert (mesh.replicate, mesh.shard, mesh.expert) == sizes
    # Every process has its own part of the batch, and ranks count the parts.
    assert mesh.world_size == mesh.data_world_size
    assert [mesh.data_rank(rank) for rank in range(mesh.world_size)] == [*range(mesh.world_size)]


def test_processes_that_share_a_sequence_share_the_data_rank() -> None:
    mesh = Mesh(replicate=2, shard=2, context=1, tensor=2)
    assert (mesh.world_size, mesh.data_world_size) == (8, 4)
    assert [mesh.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    mesh = Mesh(expert=2, context=2, tensor=2)
    assert [mesh.data_rank(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.usefixtures("group_of_eight")
def test_replicas_of_experts_are_a_group_apart() -> None:
    mesh = Mesh.replicated(8, 4).device_mesh("cpu", "replicate", "expert")
    assert mesh.mesh_dim_names == ("replicate", "expert")
    assert mesh["expert"].mesh.tolist() == [4, 5, 6, 7]
    assert mesh["replicate"].mesh.tolist() == [1, 5]


@pytest.mark.usefixtures("group_of_eight")
@pytest.mark.parametrize(
    ("mesh", "dense", "expert", "within_expert"),
    [
        (Mesh.sharded(8, 1), [*range(8)], None, [*range(8)]),
        (Mesh.sharded(8, 2), [*range(8)], [4, 5], [1, 3, 5, 7]),
        (Mesh.sharded(8, 8), [*range(8)], [*range(8)], [5]),
        (Mesh.sharded(8, 1, 4), [[0, 1, 2, 3], [4, 5, 6, 7]], None, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Mesh.sharded(8, 2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]], [4, 5], [[1, 3], [5, 7]]),
        (Mesh.sharded(8, 4, 4), [[0, 1, 2, 3], [4, 5, 6, 7]], [4, 5, 6, 7], [[1], [5]]),
    ],
)
def test_ranks_of_a_sharded_model(
    mesh: Mesh, dense: list[object], expert: list[int] | None, within_expert: list[object]
) -> None:
    found = mesh.sharded_meshes("cpu")
    assert found.dense.mesh.tolist() == dense
    assert (None if found.expert is None else found.expert.mesh.tolist()) == expert
    assert found.within_expert.mesh.tolist() == within_expert
    names = ("shard",) if mesh.replicate == 1 else ("replicate", "shard")
    assert found.dense.mesh_dim_names == found.within_expert.mesh_dim_names == names


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 3), "parallelism.expert_parallel=3: must divide the number of processes, which is 8"),
        ((4, 1, 3), "parallelism.shard_size=3: must divide the number of processes, which is 4"),
        ((2, 1, 4), "parallelism.shard_size=4: must divide the number of processes, which is 2"),
        ((8, 4, 2), "parallelism.expert_parallel=4: must divide parallelism.shard_size, which is"),
    ],
)
def test_impossible_meshes_are_refused_with_the_key(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mesh.sharded(*sizes)


def test_replicas_that_the_experts_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError, match="parallelism.expert_parallel=3: must divide .*, which is 4"
    ):
        Mesh.replicated(4, 3)


def test_the_sizes_need_no_torch() -> None:
    code = "import sys; from lunaris.distributed.mesh import Mesh; print(Mesh(2).data_rank(1))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "False"], done.stderr
