"""Rotary positions and grouped heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lunaris.model.attention.gqa import GroupedQueryAttention, RotaryInputs
from lunaris.model.attention.rotary import rope_tables, rotate
from lunaris.model.layers import ModelShape


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


@pytest.mark.parametrize("norm", ["qk_reorder", "pre"])
def test_attention_equals_its_formula_in_float64(norm: str) -> None:
    torch.manual_seed(0)
    d, heads, groups, width, length = 24, 6, 2, 4, 5
    attention = GroupedQueryAttention(
        ModelShape(
            d_model=d,
            n_layers=1,
            n_heads=heads,
            n_kv_heads=groups,
            max_seq_len=length,
            rope_theta=10.0,
            dropout=0.0,
            ffn_hidden_multiplier=1.0,
            multiple_of=1,
            norm=norm,
        )
    )
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    x = torch.randn(2, length, d)
    cos, sin = rope_tables(length, width, 10.0)

    x64, w = x.double(), attention.qkv.weight.double()
    q, k, v = (x64 @ w.T).split([24, 8, 8], dim=-1)
    out = torch.zeros(2, length, d, dtype=torch.float64)

    def normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = rows.unflatten(-1, (-1, len(weight)))
        rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        return rows.flatten(-2).unflatten(-1, (-1, width))

    def turned(rows: torch.Tensor) -> torch.Tensor:
        c, s = cos.double()[:, None], sin.double()[:, None]
        one, two = rows[..., : width // 2], rows[..., width // 2 :]
        return torch.cat((one * c - two * s, one * s + two * c), -1)

    q, k = turned(normed(q, attention.q_norm.weight)), turned(normed(k, attention.k_norm.weight))
    v = v.unflatten(-1, (groups, width))
    for b in range(2):
        for h in range(heads):
            group = h // (heads // groups)
            for i in range(length):
                scores = k[b, : i + 1, group] @ q[b, i, h] / width**0.5
                out[b, i, h * width : (h + 1) * width] = scores.softmax(0) @ v[b, : i + 1, group]
    want = F.linear(out, attention.out.weight.double())
    got = attention(x, RotaryInputs(cos, sin, None))
    torch.testing.assert_close(got, want, check_dtype=False, rtol=1e-4, atol=1e-5)
