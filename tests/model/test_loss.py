"""The chunked vocabulary loss against plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lunaris.model.loss import linear_cross_entropy, soft_capped, vocabulary_loss


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


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize(("cap", "z_weight"), [(None, 0.3), (2.0, 0.0), (2.0, 0.3), (50.0, 1e-4)])
def test_cap_and_z_loss_equal_their_definitions(
    chunk: int | None, cap: float | None, z_weight: float
) -> None:
    """The float64 definitions: c tanh(l / c) before the softmax, and the mean of log² Z."""
    x, weight, targets = inputs()
    targets[0, :5] = targets[2] = -100
    found = vocabulary_loss(x, weight, targets, soft_cap=cap, z_weight=z_weight, chunk=chunk)
    got = torch.autograd.grad(3.0 * (found.cross_entropy + z_weight * found.z), (x, weight))
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (x64 @ w64.T).flatten(0, 1)
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    entropy = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    z = logits.exp().sum(-1).log().square()[targets.flatten() >= 0].mean()
    want = torch.autograd.grad(3.0 * (entropy + z_weight * z), (x64, w64))
    torch.testing.assert_close(found.cross_entropy, entropy, check_dtype=False)
    torch.testing.assert_close(found.z, z if z_weight else 0 * z, check_dtype=False)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_both_off_is_the_plain_loss_bit_for_bit() -> None:
    x, weight, targets = inputs()
    plain = linear_cross_entropy(x, weight, targets, chunk=4)
    off = vocabulary_loss(x, weight, targets, soft_cap=None, z_weight=0.0, chunk=4)
    assert torch.equal(off.cross_entropy, plain) and not off.z.requires_grad
    # An independent copy of the loop before the options existed.
    w, rows, total = weight.detach(), x.detach().reshape(-1, 8), torch.zeros(())
    for begin in range(0, 21, 4):
        log_probs = (rows[begin : begin + 4] @ w.mT).log_softmax(-1)
        total += -log_probs.gather(1, targets.reshape(-1)[begin : begin + 4, None]).sum()
    assert torch.equal(off.cross_entropy.detach(), total * (1.0 / torch.tensor(21)))


def test_capped_logits_stay_below_the_cap() -> None:
    logits = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])
    assert soft_capped(logits, None) is logits
    capped = soft_capped(logits, 5.0)
    assert capped.abs().max() <= 5.0 and torch.equal(capped.argsort(), logits.argsort())


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
@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "z_weight": 0.1}])
def test_it_runs_inside_a_compiled_function(options: dict[str, float]) -> None:
    x, weight, targets = inputs()
    compiled = torch.compile(vocabulary_loss, backend="aot_eager", fullgraph=True)
    got = compiled(x, weight, targets, **options)
    want = vocabulary_loss(x, weight, targets, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.cross_entropy, (x, weight)),
        torch.autograd.grad(want.cross_entropy, (x, weight)),
    )
