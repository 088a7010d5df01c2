"""Stacked experts over sorted rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lunaris.model.activation import ACTIVATIONS
from lunaris.moe import experts
from lunaris.moe.experts import Experts, Product, choose_product, describe_product, product_for


def test_rows_past_the_last_expert_are_zeros_in_both_directions() -> None:
    module = Experts(3, 4, 8)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 4, requires_grad=True)
    y = module(x, torch.tensor([2, 0, 1]))
    y.sum().backward()
    assert y[:3].any(dim=1).all() and not y[3:].any()
    assert x.grad is not None
    assert x.grad[:3].any(dim=1).all() and not x.grad[3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_each_has_the_bits_of_autograds_own_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(13, 8), (4, 8, 12), (4, 6, 8), (13, 8)]
    *leaves, out_grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    sizes = [5, 0, 4, 1]  # An idle expert, and rows past the last.
    swiglu = ACTIVATIONS["swiglu"].function

    x, gate_up, down = (leaf.clone().requires_grad_() for leaf in leaves)
    *parts, past = x.split([*sizes, 3])
    each = zip(parts, gate_up, down, strict=True)
    expected = torch.cat([*(swiglu(part @ up) @ out for part, up, out in each), past * 0])
    expected.backward(out_grad)
    mine = [leaf.clone().requires_grad_() for leaf in leaves]
    y = experts.one_product_each(mine[0], torch.tensor(sizes), *mine[1:], swiglu)
    y.backward(out_grad)
    assert torch.equal(y, expected)
    for leaf, reference in zip(mine, (x, gate_up, down), strict=True):
        assert torch.equal(leaf.grad, reference.grad)


def test_no_row_at_all_still_gives_gradients() -> None:
    module = Experts(3, 4, 8)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    y = module(torch.zeros(0, 4), torch.zeros(3, dtype=torch.int64))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("product", [Product.GROUPED, Product.PADDED], ids=lambda p: p.name)
def test_every_product_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
    product: Product,
    activation: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    module = Experts(4, 16, 8, ACTIVATIONS[activation])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    data, counts = torch.randn(12, 16), torch.tensor([3, 0, 6, 1])  # one idle, two rows too many
    results = []
    for taken in (Product.LOOP, product):
        monkeypatch.setattr(experts, "product_for", lambda *_, p=taken: p)
        x = data.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = module(x, counts)
        y.float().square().sum().backward()
        results.append((y, x.grad, module.gate_up.grad, module.down.grad))
        module.zero_grad()
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    y, grad_x, *grads = results[1]
    assert not y[10:].any() and not grad_x[10:].any()
    assert all(not grad[1].any() and grad[2].any() for grad in grads)


def test_an_idle_experts_gradient_is_zero_whatever_the_kernel_left() -> None:
    weight = torch.randn(3, 2, 2, requires_grad=True)
    same = experts._ZeroWhereIdle.apply(weight, torch.tensor([2, 0, 1]))
    same.backward(torch.full((3, 2, 2), torch.nan))
    assert torch.equal(same, weight)
    assert not weight.grad[1].any() and weight.grad[0].isnan().all()


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "aligned", "product"),
    [
        ("cuda", torch.bfloat16, (9, 0), True, Product.GROUPED),
        ("cuda", torch.bfloat16, (10, 3), True, Product.GROUPED),
        ("cuda", torch.bfloat16, (9, 0), False, Product.PADDED),
        ("cuda", torch.float16, (9, 0), True, Product.PADDED),
        ("cuda", torch.float32, (10, 0), True, Product.PADDED),
        ("cuda", torch.bfloat16, (8, 0), True, Product.PADDED),
        ("cuda", torch.bfloat16, (8, 9), True, Product.PADDED),
        ("cuda", torch.bfloat16, (12, 0), True, Product.PADDED),
        ("cuda", torch.float16, (7, 5), True, Product.PADDED),
        ("cuda", torch.bfloat16, None, True, Product.PADDED),
        ("cpu", torch.bfloat16, None, True, Product.LOOP),
        ("cpu", torch.float32, None, False, Product.LOOP),
    ],
)
def test_the_device_decides_the_product(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    aligned: bool,
    product: Product,
) -> None:
    assert choose_product(device, dtype, capability, aligned=aligned) is product


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "said"),
    [
        ((9, 0), torch.bfloat16, 8, "one grouped product (bfloat16, compute capability 9.0)"),
        ((8, 0), torch.bfloat16, 8, "padded batched products (bfloat16, compute capability 8.0)"),
        ((9, 0), torch.float16, 8, "padded batched products (float16, compute capability 9.0)"),
        (
            (9, 0),
            torch.bfloat16,
            12,
            "padded batched products (bfloat16, compute capability 9.0, widths that 8 does not "
            "divide)",
        ),
    ],
)
def test_a_gpus_product_is_described(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert describe_product(torch.device("cuda", 0), dtype, torch.zeros(2, width, 16)) == said


def test_other_devices_products_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm calls its devices cuda, and numbers them otherwise."""
    w = torch.zeros(2, 8, 16)
    said = describe_product(torch.device("cpu"), torch.float32, w)
    assert said == "one product an expert (float32 on cpu)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert product_for(torch.device("cuda"), torch.bfloat16, w) is Product.PADDED
    said = describe_product(torch.device("cuda"), torch.bfloat16, w)
    assert said == "padded batched products (bfloat16 on cuda)"
