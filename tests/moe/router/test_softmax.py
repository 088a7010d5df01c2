"""Softmax gating and its bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

MakeLayer = Callable[..., nn.Module]


def test_the_bias_rises_where_the_load_is_low(make_layer: MakeLayer) -> None:
    router = make_layer(balancing="bias", bias_update_rate=0.5).router
    router.update_balance(torch.tensor([4.0, 0.0, 2.0, 2.0]))
    assert router.balance_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_only_bias_balancing_moves_the_bias(make_layer: MakeLayer) -> None:
    for balancing in ("aux_loss", "none"):
        router = make_layer(balancing=balancing).router
        router.update_balance(torch.tensor([4.0, 0.0, 2.0, 2.0]))
        assert not router.balance_bias.any()


def test_the_bias_chooses_but_does_not_gate(make_layer: MakeLayer) -> None:
    router = make_layer(balancing="bias").router
    x = torch.randn(1, 6, 8)
    router.balance_bias[3] = 9.0
    routing = router(x)
    probs = (x @ router.weight.T).softmax(-1)
    assert (routing.experts == 3).all()
    torch.testing.assert_close(routing.gates[..., 0], probs[..., 3])


def test_the_bias_balances_a_lopsided_router(make_layer: MakeLayer) -> None:
    router = make_layer(balancing="bias", bias_update_rate=0.02).router
    x = torch.randn(4, 64, 8) + 1.0
    before = router(x).load
    for _ in range(200):
        router.update_balance(router(x).load)
    after = router(x).load
    assert before.max() > 1.5 * before.mean()
    assert after.max() < 1.25 * after.mean()


def test_the_bias_is_saved_and_float32(make_layer: MakeLayer) -> None:
    layer = make_layer(balancing="bias")
    assert layer.state_dict()["router.balance_bias"].dtype == torch.float32


def test_probabilities_that_underflow_give_zeros_and_finite_gradients(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(balancing="bias", n_experts_per_token=2, normalize_gates=True)
    with torch.no_grad():
        layer.router.weight[:2] = 500.0
        layer.router.weight[2:] = -500.0
    layer.router.balance_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))
    x = torch.rand(1, 6, 8, requires_grad=True)
    assert not (x @ layer.router.weight.T).softmax(-1)[..., 2:].any()
    assert not layer.router(x).gates.any()
    y, stats = layer(x)
    (2.0**14 * y.sum() + stats.loss).backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_the_least_sum_changes_no_other_gate(make_layer: MakeLayer) -> None:
    router = make_layer(n_experts=64, n_experts_per_token=2, normalize_gates=True).router
    router.weight.data.mul_(10)
    routing = router(torch.randn(2, 50, 8))
    x = torch.randn(2, 50, 8)
    routing = router(x)
    chosen = (x @ router.weight.T).softmax(-1).gather(-1, routing.experts)
    assert torch.equal(routing.gates, chosen / chosen.sum(-1, keepdim=True))
