"""Initial weights: the same on the meta device, sharded, and at any number of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lunaris.model import init
from lunaris.model.init import fill_normal, seeded_normal
from lunaris.model.transformer import Transformer
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]


def test_meta_construction_gives_the_same_numbers(make_model: Make) -> None:
    direct = make_model({"balancing": "bias"}, seed=None)
    direct.init_weights(3)
    with torch.device("meta"):
        model = make_model({"balancing": "bias"}, seed=None)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)
    model.init_weights(3)
    for mine, other in (
        (model.state_dict(), direct.state_dict()),
        (dict(model.named_buffers()), dict(direct.named_buffers())),
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    tokens = torch.arange(8)[None]
    assert torch.equal(model.logits(tokens), direct.logits(tokens))


def test_tied_weights_stay_one_parameter(make_model: Make) -> None:
    with torch.device("meta"):
        model = make_model(seed=None)
    model.to_empty(device="cpu").init_weights(0)
    names = [name for name, _ in model.named_parameters()]
    assert model.head is None and "embedding.weight" in names
    tokens = torch.arange(8)[None]
    NextToken()(model, {"tokens": tokens, "targets": tokens}).total.backward()
    unused = model.embedding.weight.grad[20:]  # in no input: a gradient by the head alone
    assert unused.any()


def test_another_seed_gives_other_numbers(make_model: Make) -> None:
    one, two = make_model(seed=1), make_model(seed=2)
    assert not torch.equal(one.embedding.weight, two.embedding.weight)


def test_what_writes_to_the_residual_stream_is_smaller(make_model: Make) -> None:
    model = make_model({}, seed=None, d_model=64, n_layers=3, vocab_size=500)
    model.init_weights(0)
    small = 0.02 / math.sqrt(6)
    block = model.blocks[1]
    for weight, std in (
        (model.embedding.weight, 0.02),
        (block.attention.qkv.weight, 0.02),
        (block.attention.out.weight, small),
        (block.feed_forward.experts.gate_up, 0.02),
        (block.feed_forward.experts.down, small),
    ):
        assert abs(weight.std().item() / std - 1) < 0.1
        assert abs(weight.mean().item()) < 0.1 * std
    assert (block.feed_forward_norm.weight == 1).all()


def test_an_expert_does_not_depend_on_how_many_there_are() -> None:
    few, many = torch.empty(2, 3, 4), torch.empty(5, 3, 4)
    fill_normal(few, 1.0, 7, "experts")
    fill_normal(many, 1.0, 7, "experts")
    assert torch.equal(few, many[:2])
    assert len({tuple(expert.flatten().tolist()) for expert in many}) == 5


@pytest.fixture(params=range(4))
def world_of_four(request: pytest.FixtureRequest) -> Iterator[None]:
    """Be one of four processes whose others do not exist: sharding needs no exchange."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_four")
@pytest.mark.parametrize("shape", [(5, 6), (7, 3), (2, 5, 6), (6, 3, 7)], ids=str)
def test_a_shard_holds_its_part_of_the_same_numbers(shape: tuple[int, ...]) -> None:
    line = init_device_mesh("cpu", (4,))
    plane = init_device_mesh("cpu", (2, 2))
    full = torch.empty(shape)
    fill_normal(full, 1.0, 0, "w")
    layouts = [(line, [Shard(dim)]) for dim in range(len(shape))]  # uneven, and empty, ones too
    layouts += [(plane, [Shard(0), Shard(1)]), (plane, [Shard(1), Shard(1)])]
    layouts += [(plane, [Replicate(), Shard(0)]), (line, [Replicate()])]
    for mesh, placements in layouts:
        empty = torch.full(shape, torch.nan)
        parameter = distribute_tensor(empty, mesh, placements, src_data_rank=None)
        want = distribute_tensor(full, mesh, placements, src_data_rank=None)
        fill_normal(parameter, 1.0, 0, "w")
        assert torch.equal(parameter.to_local(), want.to_local()), placements


@pytest.mark.usefixtures("world_of_four")
def test_a_process_draws_no_matrix_of_which_it_holds_no_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    draw = init.seeded_normal
    monkeypatch.setattr(init, "seeded_normal", lambda *args: drawn.append(args[3]) or draw(*args))
    mesh, rank = init_device_mesh("cpu", (4,)), dist.get_rank()
    for shape, dim in (((5, 6), 0), ((2, 5, 6), 1), ((6, 5, 6), 0)):
        empty = torch.empty(shape)
        fill_normal(distribute_tensor(empty, mesh, [Shard(dim)], src_data_rank=None), 1.0, 0, "w")
    some = ["w", "w[0]", "w[1]"] if rank < 3 else []  # Rows 2, 2, 1 and 0 of five.
    mine = [f"w[{index}]" for index in range(2 * rank, min(2 * rank + 2, 6))]
    assert drawn == some + mine


def test_numbers_are_normal() -> None:
    drawn = seeded_normal((200, 200), 2.0, 0, "w")
    assert abs(drawn.std().item() - 2.0) < 0.05 and abs(drawn.mean().item()) < 0.05
