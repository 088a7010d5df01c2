"""The balance loss and capacity."""

from __future__ import annotations

import torch

from lunaris.moe.balance import balance_loss, global_balance_loss, within_capacity


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


def test_documents_have_places_of_their_own() -> None:
    """Every document of a pack keeps the assignments that it keeps alone."""
    torch.manual_seed(1)
    experts = torch.randint(0, 3, (2, 60, 2))
    lengths = [[7, 1, 30, 22], [59, 1]]
    documents = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )
    for factor in (0.3, 1.0, 1.25, 1e308):
        packed = within_capacity(experts, 3, factor, documents)
        for row, sizes in enumerate(lengths):
            parts = zip(experts[row].split(sizes), packed[row].split(sizes), strict=True)
            for part, kept in parts:
                assert torch.equal(kept, within_capacity(part[None], 3, factor)[0])
        one = within_capacity(experts, 3, factor, torch.full((2, 60), 5))
        assert torch.equal(one, within_capacity(experts, 3, factor))


def test_switch_loss_is_one_when_uniform_and_n_when_all_go_to_one() -> None:
    uniform = torch.full((2, 4, 4), 0.25)
    torch.testing.assert_close(balance_loss(uniform, torch.ones(2, 4)), torch.tensor(1.0))
    one = torch.zeros(2, 4, 4)
    one[..., 2] = 1.0
    counts = torch.tensor([[0.0, 0.0, 4.0, 0.0]] * 2)
    torch.testing.assert_close(balance_loss(one, counts), torch.tensor(4.0))


def test_sequences_that_specialise_are_balanced_globally_and_not_each() -> None:
    """Sixteen sequences, each of whose tokens all go to one of eight experts, two to each."""
    probs = torch.zeros(16, 32, 8)
    for sequence in range(16):
        probs[sequence, :, sequence % 8] = 1.0
    counts = 32.0 * probs[:, 0]
    torch.testing.assert_close(balance_loss(probs, counts), torch.tensor(8.0))
    shares = counts.sum(0) / counts.sum()
    torch.testing.assert_close(global_balance_loss(probs, shares), torch.tensor(1.0))


def test_a_capacity_beyond_every_token_drops_none() -> None:
    assert within_capacity(torch.zeros(2, 5, 1, dtype=torch.int64), 4, 1e308).all()
