"""The balance loss over the global batch, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

MakeLayer = Callable[..., nn.Module]
N, K, WEIGHT, RATE = 6, 2, 0.7, 0.5


def defined(weight: Tensor, steps: list[Tensor]) -> list[tuple[float, Tensor, Tensor]]:
    """Return each step's loss, its gradient ([N, D]) and the shares that it leaves ([N]).

    steps: the global batch of each, [B, L, D]; all in float64, one token after the other. Between
    steps the weight moves against its gradient.
    """
    weight, shares = weight.double(), torch.full((N,), 1 / N, dtype=torch.float64)
    found = []
    for x in steps:
        weight = weight.detach().requires_grad_()
        tokens = x.double().flatten(0, 1)
        mean_probs = torch.zeros(N, dtype=torch.float64)
        load = torch.zeros(N, dtype=torch.float64)
        for token in tokens:
            exps = (weight @ token).exp()
            probs = exps / exps.sum()
            mean_probs = mean_probs + probs / len(tokens)
            for expert in probs.detach().sort(descending=True).indices[:K]:
                load[expert] += 1
        loss = WEIGHT * N * sum(shares[i] * mean_probs[i] for i in range(N))
        loss.backward()
        shares = load / load.sum()
        found.append((float(loss.detach()), weight.grad, shares))
        weight = weight.detach() - RATE * weight.grad
    return found


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_loss_and_gradient_are_those_of_the_definition_however_the_batch_is_cut(
    make_layer: MakeLayer, parts: int
) -> None:
    layer = make_layer(
        n_experts=N, n_experts_per_token=K, aux_loss_weight=WEIGHT, router_z_loss_weight=0.0
    )
    router = layer.router
    torch.manual_seed(3)
    # One direction is common to all tokens, so that the load is uneven.
    steps = [torch.randn(8, 5, 8) + 0.5 for _ in range(4)]
    for x, (loss, grad, shares) in zip(steps, defined(router.weight.detach(), steps), strict=True):
        router.zero_grad()
        routings = [router(part) for part in x.chunk(parts)]
        for routing in routings:
            (routing.loss / parts).backward()
        total = sum(routing.loss.double() for routing in routings) / parts
        assert total.item() == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(
            router.weight.grad, grad, rtol=1e-4, atol=1e-6, check_dtype=False
        )
        router.update_balance(sum(routing.load.double() for routing in routings))
        torch.testing.assert_close(router.load_shares, shares.float(), rtol=0, atol=0)
        with torch.no_grad():
            router.weight.sub_(RATE * router.weight.grad)
    assert shares.max() > 2 * shares.min()


def test_before_the_first_step_it_is_one_and_has_no_gradient(make_layer: MakeLayer) -> None:
    router = make_layer(aux_loss_weight=1.0, router_z_loss_weight=0.0).router
    loss = router(torch.randn(2, 9, 8)).loss
    loss.backward()
    assert loss.item() == pytest.approx(1, rel=1e-6)
    assert router.weight.grad.abs().max() < 1e-7


@pytest.mark.parametrize(("scope", "want"), [("sequence", 8.0), ("global", 1.0)])
def test_sequences_that_each_take_one_expert_are_punished_by_the_sequence_scope_alone(
    make_layer: MakeLayer, scope: str, want: float
) -> None:
    """Sixteen sequences, each routed to one of eight experts, two sequences to each."""
    layer = make_layer(
        n_experts=8, aux_loss_weight=1.0, router_z_loss_weight=0.0, balance_scope=scope
    )
    layer.router.weight.data.copy_(30 * torch.eye(8))
    x = torch.eye(8).repeat(2, 1)[:, None].expand(16, 32, 8)
    for _ in range(2):
        _, stats = layer(x)
        layer.update_balance(stats.load)
    assert stats.load.tolist() == [64.0] * 8
    assert stats.loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "keys",
    [{"balance_scope": "sequence"}, {"balancing": "bias"}, {"balancing": "none"}],
    ids=lambda keys: "-".join(keys.values()),
)
def test_only_the_global_loss_remembers_the_load(
    make_layer: MakeLayer, keys: dict[str, str]
) -> None:
    assert "router.load_shares" in make_layer().state_dict()
    layer = make_layer(**keys)
    assert "router.load_shares" not in layer.state_dict()
    layer.update_balance(torch.ones(4))


def test_the_global_loss_evens_out_a_lopsided_router(make_layer: MakeLayer) -> None:
    layer = make_layer(aux_loss_weight=1.0, router_z_loss_weight=0.0)
    router = layer.router
    x = torch.randn(4, 64, 8) + 1.0
    before = router(x).load
    for _ in range(60):
        router.zero_grad()
        routing = router(x)
        routing.loss.backward()
        router.update_balance(routing.load)
        with torch.no_grad():
            router.weight.sub_(0.2 * router.weight.grad)
    after = router(x).load
    assert before.max() > 1.5 * before.mean()
    assert after.max() < 1.25 * after.mean() and after.min() > 0.75 * after.mean()
