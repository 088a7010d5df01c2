"""The chunked vocabulary loss against plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lunaris.model.loss import linear_cross_entropy


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    return x, weight, torch.randint(0, 11, (3, 7))


@pytest.mark.parametrize("chunk", [1, 4, 21, 100, None])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_gradients_equal_cross_entropy(chunk: int | None, ignored: bool) -> None:
    x, weight, targets = inputs()
    if ignored:
        targets[0, :5] = -100
        targets[2] = -100
    loss = linear_cross_entropy(x, weight, targets, chunk)
    got = torch.autograd.grad(3.0 * loss, (x, weight))
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain = F.cross_entropy((x64 @ w64.T).flatten(0, 1), targets.flatten(), ignore_index=-100)
    want = torch.autograd.grad(3.0 * plain, (x64, w64))
    torch.testing.assert_close(loss, plain, check_dtype=False)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_gives_zeros() -> None:
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert x.grad is not None and not x.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_keep_float32_sums(dtype: torch.dtype) -> None:
    x, weight, targets = inputs()
    exact = linear_cross_entropy(x, weight, targets)
    want = torch.autograd.grad(exact, (x, weight))
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(x, weight, targets, chunk=4)
    got = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.01)


def test_one_side_alone_may_ask_for_a_gradient() -> None:
    x, weight, targets = inputs()
    both = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    (only_x,) = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), targets), x)
    (only_w,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, targets), weight)
    torch.testing.assert_close((only_x, only_w), both)


def test_without_grad_mode_no_gradient_is_computed() -> None:
    x, weight, targets = inputs()
    with torch.profiler.profile() as profile, torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, chunk=21)
    assert not loss.requires_grad
    names = [event.key for event in profile.key_averages()]
    assert "aten::mm" in names and "aten::scatter_add_" not in names


# The compiler's own use of a Function, not ours.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_runs_inside_a_compiled_function() -> None:
    x, weight, targets = inputs()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager")
    got = compiled(x, weight, targets)
    want = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight))
    )
