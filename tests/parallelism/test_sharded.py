"""Sharding in one process: precision, compilation, names, refusals, the exchange of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lunaris.distributed import session
from lunaris.errors import UserError
from lunaris.model.roles import Role
from lunaris.moe import experts
from lunaris.moe.experts import Experts, Product
from lunaris.objective.next_token import NextToken
from lunaris.optim.adamw import build_adamw
from lunaris.optim.clip import clip_grad_norm
from lunaris.parallelism.base import Parallelism, unwrap
from lunaris.parallelism.ddp import DDP
from lunaris.parallelism.expert import _by_expert, shard_experts
from lunaris.parallelism.fsdp import FSDP, HSDP
from lunaris.parallelism.single import Single
from lunaris.precision import Precision


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Open a session of this process alone."""
    with session.join("cpu", 60.0):
        yield


@pytest.fixture
def steps(tiny: Callable[..., Any]) -> Callable[..., list[tuple[float, float]]]:
    """Return a function that takes three steps and returns their losses and gradient norms."""
    from lunaris.run import bare_model

    def take(
        parallelism: Parallelism, precision: str, *overrides: str, compile: bool = False
    ) -> list[tuple[float, float]]:
        cfg = tiny(*overrides)
        kind = Precision(precision, parallelism.device)
        model = parallelism.wrap(bare_model(cfg, 64), precision=kind, seed=1, compile=compile)
        optimizer = build_adamw(
            model, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
        )
        found = []
        for step in range(3):
            tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))
            with parallelism.micro_step(model, last=True):
                with kind.autocast():
                    out = NextToken()(model, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
                kind.scaler.scale(out.total).backward()
            kind.scaler.unscale_(optimizer)
            norm = clip_grad_norm(model.parameters(), 1.0)
            kind.scaler.step(optimizer)
            kind.scaler.update()
            optimizer.zero_grad()
            found.append((out.total.item(), norm.item()))
        return found

    return take


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("moe", ["moe=none", "moe=top2"])
def test_sharded_precision_is_autocast(steps: Callable[..., Any], precision: str, moe: str) -> None:
    """Weights are cast before the gather, but only those that autocast casts."""
    expected = steps(Single(), precision, moe)
    for found in (steps(FSDP(), precision, moe), steps(DDP(), precision, moe)):
        for a, b in zip(expected, found, strict=True):
            assert b == pytest.approx(a, rel=1e-6)


def test_half_is_gathered_and_float32_kept(tiny: Callable[..., Any]) -> None:
    from lunaris.run import bare_model

    fsdp = FSDP()
    model = fsdp.wrap(
        bare_model(tiny("moe=switch"), 64),
        precision=Precision("bf16", fsdp.device),
        seed=1,
        compile=False,
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    whole = {name for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert whole and all("norm" in name or "router" in name for name in whole)
    seen = {}
    block = model.blocks[0]
    for name in ("attention.qkv", "feed_forward.router", "feed_forward_norm"):
        module = block.get_submodule(name)
        module.register_forward_pre_hook(lambda m, _, n=name: seen.update({n: m.weight.dtype}))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert seen["attention.qkv"] == torch.bfloat16
    assert seen["feed_forward.router"] == seen["feed_forward_norm"] == torch.float32


# Said by the compiler to itself, which hides it unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("parallelism", [Single, DDP, FSDP])
def test_compiled_blocks(
    steps: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, parallelism: type[Parallelism]
) -> None:
    """Each block is one graph, also where its parameters are sharded and cast."""
    whole = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(
        torch, "compile", lambda f: whole(f, backend="aot_eager", fullgraph=True, dynamic=False)
    )
    expected = steps(parallelism(), "bf16", "moe=none")
    found = steps(parallelism(), "bf16", "moe=none", compile=True)
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-2)


@pytest.mark.parametrize("parallelism", [DDP, FSDP])
def test_names_are_those_of_the_model(
    tiny: Callable[..., Any], parallelism: type[Parallelism]
) -> None:
    from lunaris.run import bare_model

    bare = bare_model(tiny(), 64)
    names = [name for name, _ in bare.named_parameters()]
    made = parallelism()
    kind = Precision("fp32", made.device)
    model = made.wrap(bare, precision=kind, seed=1, compile=False)
    assert [name for name, _ in unwrap(model).named_parameters()] == names


def test_one_process_agrees_and_sums() -> None:
    single = Single()
    # Its own flag is the answer, at once and without a look at the device.
    votes = torch.zeros((), device="meta")
    assert single.agree(True, votes) and not single.agree(False, votes)
    assert single.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_degrees_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="parallelism.expert_parallel=2"):
        DDP(expert_parallel=2)
    with pytest.raises(UserError, match="parallelism.shard_size=2: must divide"):
        HSDP(shard_size=2)


def test_received_tokens_are_sorted_by_expert() -> None:
    # Two processes send 2 and 1 tokens of the first expert, 1 and 3 of the second.
    received = torch.tensor([[2, 1], [1, 3]])
    assert _by_expert(received, 7).tolist() == [0, 1, 3, 2, 4, 5, 6]


class Doubled(nn.Module):
    """Stands for stacked experts: the e-th multiplies its rows by its weight."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def parameter_roles(self) -> dict[str, Role]:
        return {"weight": Role.EXPERT}

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return each row times its expert's weight."""
        weight: Any = self.weight
        return x * weight.to_local().repeat_interleave(counts)[:, None]


def test_exchange_keeps_order_and_gradients() -> None:
    session.ensure_group()
    holder = nn.Module()
    holder.experts = Doubled([2.0, 3.0, 5.0])
    shard_experts(holder, init_device_mesh("cpu", (1,)), compile=False)
    x = torch.arange(10.0).view(5, 2).requires_grad_()
    # One row of the first expert, none of the second, three of the third; one row dropped.
    y = holder.experts(x, torch.tensor([1, 0, 3]))
    factor = torch.tensor([2.0, 5.0, 5.0, 5.0, 0.0])[:, None]
    torch.testing.assert_close(y, x * factor)
    y.sum().backward()
    torch.testing.assert_close(x.grad, factor.expand(5, 2))
    grad = holder.experts.weight.grad
    assert isinstance(grad, DTensor)
    assert grad.to_local().tolist() == [1.0, 0.0, 2.0 + 3.0 + 4.0 + 5.0 + 6.0 + 7.0]


@pytest.mark.parametrize("product", [Product.LOOP, Product.PADDED], ids=lambda p: p.name)
def test_the_exchange_knows_the_largest_load(
    monkeypatch: pytest.MonkeyPatch, product: Product
) -> None:
    """The caller's bound is of one process; rows of others may exceed it."""
    monkeypatch.setattr(experts, "product_for", lambda *_: product)
    session.ensure_group()
    torch.manual_seed(0)
    alone = Experts(3, 4, 8)
    for parameter in alone.parameters():
        nn.init.normal_(parameter)
    holder = nn.Module()
    holder.experts = copy.deepcopy(alone)
    shard_experts(holder, init_device_mesh("cpu", (1,)), compile=False)
    x, counts = torch.randn(9, 4), torch.tensor([1, 0, 7])
    y = holder.experts(x, counts, 2)
    monkeypatch.setattr(experts, "product_for", lambda *_: Product.LOOP)
    torch.testing.assert_close(y, alone(x, counts))
