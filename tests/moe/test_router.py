"""Balancing, capacity and the losses of the router."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lunaris.moe.router import balance_loss, within_capacity

MakeLayer = Callable[..., nn.Module]


def test_earlier_tokens_keep_their_place() -> None:
    experts = torch.tensor([[[0], [1], [0], [0], [1], [0]]])
    fits = within_capacity(experts, n_experts=2, factor=2 / 3)  # two places each
    assert fits.flatten().tolist() == [True, True, True, False, True, False]


def test_capacity_is_taken_in_order_at_any_length() -> None:
    torch.manual_seed(0)
    experts = torch.randint(0, 5, (3, 400, 2))
    fits = within_capacity(experts, n_experts=5, factor=0.6)
    capacity = 96  # 0.6 · 800 / 5
    for row, kept in zip(experts.flatten(1), fits.flatten(1), strict=True):
        for expert in range(5):
            mine = kept[row == expert]
            assert mine[:capacity].all() and not mine[capacity:].any()


def test_switch_loss_is_one_when_uniform_and_n_when_all_go_to_one() -> None:
    uniform = torch.full((2, 4, 4), 0.25)
    torch.testing.assert_close(balance_loss(uniform, torch.ones(2, 4)), torch.tensor(1.0))
    one = torch.zeros(2, 4, 4)
    one[..., 2] = 1.0
    counts = torch.tensor([[0.0, 0.0, 4.0, 0.0]] * 2)
    torch.testing.assert_close(balance_loss(one, counts), torch.tensor(4.0))


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


def test_a_capacity_beyond_every_token_drops_none() -> None:
    assert within_capacity(torch.zeros(2, 5, 1, dtype=torch.int64), 4, 1e308).all()
