"""Every attention against its formula in float64, one query after another: forward and gradients.

Formulas: grouped queries arXiv 2305.13245, windows 2004.05150 (section 3.1), latent attention
2405.04434 (equations 9 to 19 and appendix C), headwise output gates 2505.06708 (section 2.2), sinks
as in gpt-oss (2508.10925).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lunaris.model.attention.base import Attention, Positions
from lunaris.model.attention.gqa import GroupedQueryAttention
from lunaris.model.attention.mla import MultiHeadLatentAttention

D, HEADS, GROUPS, LENGTH, THETA = 24, 6, 2, 7, 10.0
BOTH = {"output_gate": True, "sinks": True}
WIDTHS = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
CASES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "gqa": (GroupedQueryAttention, "pre", {}),
    "gqa-reorder": (GroupedQueryAttention, "qk_reorder", {}),
    "gqa-gate": (GroupedQueryAttention, "pre", {"output_gate": True}),
    "gqa-sinks": (GroupedQueryAttention, "qk_reorder", {"sinks": True}),
    "window": (GroupedQueryAttention, "pre", {"window": 3}),
    "window-of-one": (GroupedQueryAttention, "pre", {"window": 1, **BOTH}),
    "window-gate-sinks": (GroupedQueryAttention, "qk_reorder", {"window": 3, **BOTH}),
    "mla": (MultiHeadLatentAttention, "pre", {"q_lora_rank": None, **WIDTHS}),
    "mla-low-rank": (MultiHeadLatentAttention, "pre", {"q_lora_rank": 8, **WIDTHS}),
    "mla-gate-sinks": (MultiHeadLatentAttention, "pre", {"q_lora_rank": 8, **WIDTHS, **BOTH}),
    "mla-wide-values": (
        MultiHeadLatentAttention,
        "pre",
        {"q_lora_rank": None, **WIDTHS, "v_head_dim": 13, "sinks": True},
    ),
}


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the weight's width, which divides the last dimension."""
    rows = x.unflatten(-1, (-1, len(weight)))
    return (rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).flatten(-2)


def turned(x: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of [B, L, n, K] by position · θ^(-2i/K)."""
    width = x.size(-1)
    angles = torch.arange(x.size(1), dtype=x.dtype)[:, None] * THETA ** (
        -torch.arange(0, width, 2, dtype=x.dtype) / width
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, two = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat((one * cos - two * sin, one * sin + two * cos), -1)


def projections(kind: type, p: dict[str, Tensor], x: Tensor, keys: dict[str, Any]) -> list[Tensor]:
    """Return queries, keys and values, [B, L, HEADS, width] each."""
    if kind is GroupedQueryAttention:
        width = D // HEADS
        q, k, v = (x @ p["qkv.weight"].T).split([D, GROUPS * width, GROUPS * width], dim=-1)
        q, k = normed(q, p["q_norm.weight"]), normed(k, p["k_norm.weight"])
        q, k, v = (t.unflatten(-1, (-1, width)) for t in (q, k, v))
        k, v = (t.repeat_interleave(HEADS // GROUPS, dim=2) for t in (turned(k), v))
        return [turned(q), k, v]
    nope, rope, value = (keys[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    latent = keys["kv_lora_rank"]
    q = x if "q_a.weight" not in p else normed(x @ p["q_a.weight"].T, p["q_norm.weight"])
    q = (q @ p["q_b.weight"].T).unflatten(-1, (HEADS, nope + rope))
    q = torch.cat((q[..., :nope], turned(q[..., nope:])), -1)
    kv = x @ p["kv_a.weight"].T
    shared = turned(kv[..., None, latent:]).expand(-1, -1, HEADS, -1)
    kv = normed(kv[..., :latent], p["kv_norm.weight"]) @ p["kv_b.weight"].T
    kv = kv.unflatten(-1, (HEADS, nope + value))
    return [q, torch.cat((kv[..., :nope], shared), -1), kv[..., nope:]]


def reference(
    kind: type, p: dict[str, Tensor], x: Tensor, documents: Tensor, keys: dict[str, Any]
) -> Tensor:
    q, k, v = projections(kind, p, x, keys)
    rows = []
    for b in range(x.size(0)):
        for i in range(LENGTH):
            first = max(0, i + 1 - (keys.get("window") or LENGTH))
            seen = [j for j in range(first, i + 1) if documents[b, j] == documents[b, i]]
            heads = []
            for h in range(HEADS):
                weights = (k[b, seen, h] @ q[b, i, h] / q.size(-1) ** 0.5).exp()
                below = weights.sum()
                if "sinks" in p:
                    below = below + p["sinks"][h].exp()
                y = weights @ v[b, seen, h] / below
                if "gate.weight" in p:
                    y = y / (1 + (-(p["gate.weight"][h] @ x[b, i])).exp())
                heads.append(y)
            rows.append(torch.cat(heads) @ p["out.weight"].T)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_the_formula(
    make_attention: Callable[..., Attention], case: str, packed: bool
) -> None:
    kind, norm, keys = CASES[case]
    groups = GROUPS if kind is GroupedQueryAttention else HEADS
    attention = make_attention(kind, norm=norm, n_kv_heads=groups, **keys)
    x = torch.randn(2, LENGTH, D, requires_grad=True)
    towards = torch.randn(2, LENGTH, D)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 6, 6, 6, 6, 6, 9]])
    if not packed:
        documents = torch.zeros_like(documents)
    positions = Positions(0, LENGTH, torch.device("cpu"), documents if packed else None)
    y = attention(x, attention.prepare(positions))
    (y * towards).sum().backward()

    p = {n: q.detach().double().requires_grad_() for n, q in attention.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    want = reference(kind, p, x64, documents, keys)
    (want * towards.double()).sum().backward()

    close = {"rtol": 1e-4, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(y, want, **close)
    torch.testing.assert_close(x.grad, x64.grad, **close)
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(
            parameter.grad, p[name].grad, **close, msg=lambda m, n=name: n + m
        )


def test_a_sink_takes_all_and_a_gate_closes(make_attention: Callable[..., Attention]) -> None:
    attention = make_attention(GroupedQueryAttention, norm="pre", n_kv_heads=2, **BOTH)
    assert isinstance(attention.sinks, nn.Parameter)
    positions = Positions(0, LENGTH, torch.device("cpu"))
    prepared = attention.prepare(positions)
    x = torch.rand(2, LENGTH, D)
    with torch.no_grad():
        attention.sinks.fill_(60.0)
        assert attention(x, prepared).abs().max() < 1e-15
        attention.sinks.fill_(-60.0)
        open_ = attention(x, prepared)
        assert open_.abs().max() > 0.1
        attention.gate.weight.fill_(-50.0)
        assert attention(x, prepared).abs().max() < 1e-15 * open_.abs().max()
