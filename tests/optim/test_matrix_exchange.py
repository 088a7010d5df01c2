"""Muon over sharded matrices, each computed by one of its processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lunaris.model.roles import Role
from lunaris.optim import matrix_exchange, muon
from lunaris.optim.muon import build_muon

# Global shapes, and how each lies on a mesh of 2 replicas of 3 shards: even and uneven, a process
# without any row, whole experts, rows of experts, columns of experts, and not at all.
LAYOUTS: list[tuple[tuple[int, ...], Placement]] = [
    ((6, 4), Shard(0)),
    ((7, 4), Shard(0)),
    ((2, 5), Shard(0)),
    ((3, 5, 4), Shard(0)),
    ((2, 6, 4), Shard(1)),
    ((2, 4, 7), Shard(2)),
    ((6, 4), Shard(1)),
    ((5, 5), Replicate()),
]
SETTINGS = {
    "learning_rate": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8,
    "momentum": 0.9, "orthogonalization": "polar_express", "ns_steps": 3,
}  # fmt: skip


class Matrices(nn.Module):
    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(value) for value in values])

    def parameter_roles(self) -> dict[str, Role]:
        return {f"values.{i}": Role.MATRIX for i in range(len(self.values))}


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape, _ in LAYOUTS]


def after_three_steps(model: Matrices, place) -> list[Tensor]:
    optimizer = build_muon(model, **SETTINGS)
    for step in range(3):
        for i, (parameter, grad) in enumerate(zip(model.values, drawn(step + 1), strict=True)):
            parameter.grad = place(i, grad)
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.values]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=6)
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicas", "shards"))
    sent = []
    exchange = dist.all_to_all_single
    dist.all_to_all_single = lambda *a, **k: sent.append(1) or exchange(*a, **k)  # type: ignore[assignment]

    def place(i: int, value: Tensor) -> Tensor:
        return distribute_tensor(value, mesh, [Replicate(), LAYOUTS[i][1]], src_data_rank=None)

    model = Matrices([place(i, value) for i, value in enumerate(drawn(0))])
    found = [p.detach() for p in after_three_steps(model, place)]
    exchanges = len(sent)
    # Replicas are no parts, else a bucket of many replicas would hold too much.
    assert [muon._shards(place(i, value)) for i, value in enumerate(drawn(0))] == [3] * 7 + [1]
    # The last process of three has no row of it, and nothing to send.
    few = torch.arange(10.0).reshape(2, 5)
    part = matrix_exchange.part_of(place(2, few), place(2, few).to_local())
    (doubled,) = matrix_exchange.map_matrices(lambda x: 2 * x, [part], 0)
    assert torch.equal(doubled, 2 * part.values)
    twice = distribute_tensor(torch.ones(6, 6), mesh, [Shard(0), Shard(1)])
    with pytest.raises(NotImplementedError, match="one mesh dimension"):
        matrix_exchange.part_of(twice, twice.to_local())
    torch.save((found, exchanges), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_numbers_are_those_of_one_process_and_a_step_exchanges_twice(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    want = after_three_steps(Matrices(drawn(0)), lambda i, grad: grad)
    for rank in range(6):
        found, exchanges = torch.load(tmp_path / f"{rank}.pt")
        assert exchanges == 6
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_work_is_divided_evenly() -> None:
    shapes = [(8, 8)] * 4 + [(8, 32)] * 2 + [(8, 16)] * 3
    matrices = [matrix_exchange._Matrix(i, 0, shape, [], -2) for i, shape in enumerate(shapes)]
    owned = matrix_exchange._divide(matrices, 3)
    assert sorted(m.part for mine in owned for m in mine) == list(range(len(shapes)))
    loads = [sum(matrix_exchange._work(m) for m in mine) for mine in owned]
    assert max(loads) - min(loads) <= 8 * 8 * 8


def test_the_batches_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(0)
    want = after_three_steps(Matrices([v.clone() for v in values]), lambda i, grad: grad)
    monkeypatch.setattr(muon, "_AT_ONCE", 30)
    found = after_three_steps(Matrices([v.clone() for v in values]), lambda i, grad: grad)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_matrices_of_one_shape_are_taken_together_up_to_a_size() -> None:
    sizes = []

    def double(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return 2 * x

    tensors = [torch.randn(4, 6), torch.randn(3, 2, 5), torch.randn(2, 4, 6), torch.randn(4, 6)]
    found = matrix_exchange._in_batches(double, tensors, 80)
    assert sizes == [72, 24, 30]
    for one, tensor in zip(found, tensors, strict=True):
        torch.testing.assert_close(one, 2 * tensor, rtol=0, atol=0)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(worker, (sys.argv[1],), nprocs=6, start_method="fork")
