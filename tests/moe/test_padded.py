"""The product of padded blocks: any routing fits, nothing of the padding gets out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lunaris.model.activation import ACTIVATIONS
from lunaris.moe import blocks, padded
from lunaris.moe.blocks import Blocks, blocks_for
from lunaris.moe.experts import one_product_each
from lunaris.moe.padded import padded_product

# Rows of each expert: even, uneven, all to one, the last idle, one row, none.
LOADS = [
    [8, 8, 8, 8],
    [1, 0, 30, 1],
    [32, 0, 0, 0],
    [0, 0, 0, 32],
    [9, 17, 6, 0],
    [0, 1, 0, 0],
    [0, 0, 0, 0],
]
WIDTH, HIDDEN = 12, 6


def both_ways(
    product: Callable[..., Tensor], activation: str, counts: list[int], more: int, *most: int
) -> list[Tensor]:
    """Return the output of float64 rows and the gradients of rows and weights."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    kind = ACTIVATIONS[activation]
    x = drawn(sum(counts) + more, WIDTH)
    weights = drawn(len(counts), WIDTH, kind.columns(HIDDEN)), drawn(len(counts), HIDDEN, WIDTH)
    out = product(x, torch.tensor(counts), *weights, kind.function, *most)
    (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum().backward()
    return [out.detach(), *(each.grad for each in (x, *weights) if each.grad is not None)]


@pytest.mark.parametrize("size", [1, 3, 8, 32])
@pytest.mark.parametrize("counts", LOADS, ids=str)
@pytest.mark.parametrize("more", [0, 5])
def test_blocks_of_any_size_give_the_loops_numbers(
    monkeypatch: pytest.MonkeyPatch, size: int, counts: list[int], more: int
) -> None:
    total = sum(counts) + more
    monkeypatch.setattr(
        padded, "blocks_for", lambda *_: Blocks(size, max(0, total - 1) // size if total else 0)
    )
    for activation in ACTIVATIONS:
        found = both_ways(padded_product, activation, counts, more)
        right = both_ways(one_product_each, activation, counts, more)
        assert len(found) == len(right) == 4
        for mine, other in zip(found, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", LOADS, ids=str)
@pytest.mark.parametrize("few", [4, 512])
def test_the_chosen_blocks_give_the_loops_numbers(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], few: int
) -> None:
    monkeypatch.setattr(blocks, "_BALANCED", few)
    right = both_ways(one_product_each, "swiglu", counts, 0)
    for most in ((), (max(counts),), (sum(counts),)):
        found = both_ways(padded_product, "swiglu", counts, 0, *most)
        for mine, other in zip(found, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("few", [2, 16, 512])
def test_blocks_hold_every_routing(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(blocks, "_BALANCED", few)
    generator = torch.Generator().manual_seed(0)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(500):
        n_experts, n_rows = 1 + below(9), below(400)
        favourite = below(n_experts)
        skewed = torch.rand(n_rows, generator=generator) < below(11) / 10
        expert = torch.randint(n_experts, (n_rows,), generator=generator)
        counts = torch.where(skewed, favourite, expert).bincount(minlength=n_experts)
        most = max(int(counts.max()), below(n_rows + 1))
        made = blocks_for(n_rows, n_experts, most)
        beyond = sum(max(0, -(-n // made.rows) - 1) for n in counts.tolist())
        assert beyond <= made.extra
        assert made.rows >= 1 and (made.extra == 0 or made.rows < most)


def test_blocks_of_usual_layers() -> None:
    # 16,384 tokens: 8 of 64 experts without a limit, one of 8 with a capacity factor of 1.25.
    assert blocks_for(131072, 64, 16384) == Blocks(1024, 127)
    assert blocks_for(16384, 8, 2560) == Blocks(2560, 0)
    # A token that is generated, and no token at all.
    assert blocks_for(2, 8, 1) == Blocks(1, 0)
    assert blocks_for(0, 8, 0) == Blocks(1, 0)
    # Every token to every expert: nothing is padded.
    assert blocks_for(4096, 4, 1024) == Blocks(1024, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_expert(
    monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """Neither rows past the last expert nor another expert's rows reach an output or a gradient."""
    monkeypatch.setattr(padded, "blocks_for", lambda *_: Blocks(4, 3))
    x = torch.randn(12, WIDTH)
    x[0], x[10:] = bad, bad
    x.requires_grad_()
    gate_up = torch.randn(3, WIDTH, 2 * HIDDEN, requires_grad=True)
    down = torch.randn(3, HIDDEN, WIDTH, requires_grad=True)
    counts = torch.tensor([2, 0, 8])
    out = padded_product(x, counts, gate_up, down, ACTIVATIONS["swiglu"].function)
    assert not out[0].isfinite().any() and not out[10:].any()
    assert out[1:10].isfinite().all() and out[1:10].any(dim=1).all()
    out.sum().backward()
    assert x.grad is not None and x.grad[1:].isfinite().all() and not x.grad[10:].any()
    for weight in (gate_up, down):
        assert weight.grad is not None and not weight.grad[0].isfinite().all()
        assert weight.grad[1:].isfinite().all() and not weight.grad[1].any()
        assert weight.grad[2].any()


def test_nothing_waits_for_the_device_or_depends_on_the_routing() -> None:
    """A fake tensor has no values: what would fetch one to the host raises."""
    with FakeTensorMode():
        x = torch.randn(600, WIDTH, requires_grad=True)
        weights: Any = torch.randn(4, WIDTH, 2 * HIDDEN), torch.randn(4, HIDDEN, WIDTH)
        for weight in weights:
            weight.requires_grad_()
        counts = torch.zeros(4, dtype=torch.int64)
        out = padded_product(x, counts, *weights, ACTIVATIONS["swiglu"].function)
        out.sum().backward()
        for each in (x, *weights):
            assert each.grad is not None and each.grad.shape == each.shape
    assert blocks_for(600, 4, 600).extra > 0


def test_the_backward_is_that_of_numerical_differentiation() -> None:
    counts = torch.tensor([3, 0, 5])
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((9, 3), (3, 3, 4), (3, 2, 3))
    ]
    activate = ACTIVATIONS["swiglu"].function
    assert torch.autograd.gradcheck(
        lambda x, up, down: padded_product(x, counts, up, down, activate), inputs
    )
