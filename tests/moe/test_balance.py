"""The balance loss and capacity."""

from __future__ import annotations

import torch

from lunaris.moe.balance import balance_loss, within_capacity


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


def test_a_capacity_beyond_every_token_drops_none() -> None:
    assert within_capacity(torch.zeros(2, 5, 1, dtype=torch.int64), 4, 1e308).all()
