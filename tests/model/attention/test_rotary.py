"""Rotary positions."""

from __future__ import annotations

import torch

from lunaris.model.attention.rotary import rope_tables, rotate


def test_rotated_products_depend_on_the_distance_alone() -> None:
    cos, sin = rope_tables(64, 16, 100.0)
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    q_at = rotate(q.expand(1, 64, 1, 16), cos, sin)[0, :, 0]
    k_at = rotate(k.expand(1, 64, 1, 16), cos, sin)[0, :, 0]
    products = q_at @ k_at.T
    for distance in (0, 1, 7, 40):
        line = products.diagonal(-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)
    assert abs(products[1, 0] - products[40, 0]) > 1e-2


def test_rotation_keeps_lengths_and_position_zero() -> None:
    cos, sin = rope_tables(8, 4, 10000.0)
    x = torch.randn(2, 8, 3, 4)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
