"""Sigmoid gating: its gates, its groups and its losses, as DeepSeek-V3 defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lunaris.moe.router.sigmoid import SigmoidRouterFactory

MakeLayer = Callable[..., nn.Module]


def route(make_layer: MakeLayer, logits: list[list[float]], keys: Any, **more: Any) -> Any:
    """Return the routing of tokens with these logits, one sequence ([1, L, …])."""
    router = make_layer(
        router=SigmoidRouterFactory(**keys), n_experts=len(logits[0]), **more
    ).router
    x = torch.eye(8)[: len(logits)]
    router.weight.data.zero_()
    router.weight.data[:, : len(logits)] = torch.tensor(logits).T
    return router(x[None])


def test_a_group_s_score_is_the_sum_of_its_two_best(make_layer: MakeLayer) -> None:
    # By its best expert the first group leads, by the sum of two the second, by all the third.
    logits = [[3.0, -9.0, -9.0, 1.0, 0.9, -9.0, 0.3, 0.2, 0.1]]
    one = route(make_layer, logits, {"n_groups": 3, "topk_groups": 1})
    assert one.experts.flatten().tolist() == [3]
    two = route(make_layer, logits, {"n_groups": 3, "topk_groups": 2}, n_experts_per_token=3)
    assert two.experts.flatten().tolist() == [3, 4, 6]
    free = route(make_layer, logits, {})
    assert free.experts.item() == 0


def test_an_expert_of_a_closed_group_is_not_chosen_for_want_of_good_ones(
    make_layer: MakeLayer,
) -> None:
    """Biased scores below zero still beat those of a closed group."""
    router = make_layer(
        router=SigmoidRouterFactory(n_groups=2, topk_groups=1),
        balancing="bias",
        n_experts_per_token=2,
    ).router
    router.balance_bias.copy_(torch.tensor([-5.0, -7.0, -9.0, -9.0]))
    experts = router(torch.randn(2, 6, 8)).experts
    assert experts.sort(-1).values.eq(torch.tensor([0, 1])).all()


def test_gates_are_raw_scores_or_their_shares_times_the_scale(make_layer: MakeLayer) -> None:
    logits = [[2.0, 1.0, -1.0, 0.0], [0.0, -3.0, 4.0, 1.0]]
    scores = torch.tensor(logits).sigmoid()
    raw = route(make_layer, logits, {"route_scale": 2.5}, n_experts_per_token=2)
    torch.testing.assert_close(raw.gates[0], 2.5 * scores.topk(2).values)
    shares = route(
        make_layer, logits, {"route_scale": 2.5}, n_experts_per_token=2, normalize_gates=True
    )
    torch.testing.assert_close(shares.gates.sum(-1), torch.full((1, 2), 2.5))


def test_the_bias_chooses_but_does_not_gate(make_layer: MakeLayer) -> None:
    router = make_layer(router=SigmoidRouterFactory(), balancing="bias").router
    router.balance_bias[3] = 9.0
    x = torch.randn(1, 6, 8)
    routing = router(x)
    assert (routing.experts == 3).all()
    torch.testing.assert_close(routing.gates, (x @ router.weight.T).sigmoid()[..., 3:])


def test_the_bias_balances_a_lopsided_router(make_layer: MakeLayer) -> None:
    router = make_layer(
        router=SigmoidRouterFactory(), balancing="bias", bias_update_rate=0.005
    ).router
    x = torch.randn(4, 64, 8) + 1.0
    before = router(x).load
    for _ in range(300):
        router.update_balance(router(x).load)
    after = router(x).load
    assert before.max() > 1.5 * before.mean()
    assert after.max() < 1.25 * after.mean()


def test_scores_that_underflow_give_zeros_and_finite_gradients(make_layer: MakeLayer) -> None:
    layer = make_layer(router=SigmoidRouterFactory(), n_experts_per_token=2, normalize_gates=True)
    with torch.no_grad():
        layer.router.weight.fill_(-500.0)
    x = (torch.rand(1, 6, 8) + 0.1).requires_grad_()
    assert not layer.router(x).gates.any()
    y, stats = layer(x)
    (2.0**14 * y.sum() + stats.loss).backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_sequence_loss_is_one_when_even_and_n_over_k_when_all_take_the_same(
    make_layer: MakeLayer, weight: float
) -> None:
    def loss(logits: list[list[float]], k: int) -> Tensor:
        keys = {"sequence_loss_weight": weight}
        more = {"router_z_loss_weight": 0.0, "balancing": "bias", "n_experts_per_token": k}
        return route(make_layer, logits, keys, **more).loss

    diagonal = (40 * torch.eye(4) - 20).tolist()
    torch.testing.assert_close(loss(diagonal, 1), torch.tensor(weight))
    one = [[20.0, -20.0, -20.0, -20.0]] * 3
    torch.testing.assert_close(loss(one, 1), torch.tensor(4 * weight))
    two = [[20.0, 20.0, -20.0, -20.0]] * 3
    torch.testing.assert_close(loss(two, 2), torch.tensor(2 * weight))


def test_the_sequence_loss_counts_raw_scores(make_layer: MakeLayer) -> None:
    """The bias, which moves the choice, does not move fᵢ (arXiv 2412.19437, eq. 18)."""
    router = make_layer(
        router=SigmoidRouterFactory(sequence_loss_weight=1.0), balancing="bias"
    ).router
    x = torch.randn(2, 6, 8)
    before = router(x)
    router.balance_bias[3] = 9.0
    after = router(x)
    assert not torch.equal(after.experts, before.experts)
    assert torch.equal(after.loss, before.loss)
