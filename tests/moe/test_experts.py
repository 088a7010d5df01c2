"""Stacked experts over sorted rows."""

from __future__ import annotations

import torch
from torch import nn

from lunaris.moe.experts import Experts, grouped_mm_fits


def test_rows_past_the_last_expert_are_zeros_in_both_directions() -> None:
    experts = Experts(3, 4, 8)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 4, requires_grad=True)
    y = experts(x, torch.tensor([2, 0, 1]))
    y.sum().backward()
    assert y[:3].any(dim=1).all() and not y[3:].any()
    assert x.grad is not None
    assert x.grad[:3].any(dim=1).all() and not x.grad[3:].any()


def test_no_row_at_all_still_gives_gradients() -> None:
    experts = Experts(3, 4, 8)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    y = experts(torch.zeros(0, 4), torch.zeros(3, dtype=torch.int64))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_the_grouped_product_is_left_to_a_gpu_in_bf16() -> None:
    x, w = torch.zeros(2, 8), torch.zeros(2, 8, 16)
    assert not grouped_mm_fits(x, torch.bfloat16, w)
