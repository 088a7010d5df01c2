"""The layer against a loop over tokens in float64, and what it must not do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lunaris.moe import blocks, experts, padded
from lunaris.moe.experts import Product
from lunaris.moe.router.sigmoid import SigmoidRouterFactory
from lunaris.moe.router.softmax import SoftmaxRouterFactory

MakeLayer = Callable[..., nn.Module]
AUX, Z = 0.3, 0.2


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    z = x @ gate_up
    if activation == "relu2":
        return z.clamp_min(0) ** 2 @ down
    gate, up = z.chunk(2, dim=-1)
    return ({"swiglu": F.silu, "geglu": F.gelu}[activation](gate) * up) @ down


@dataclass(frozen=True)
class Sigmoid:
    """The keys of a sigmoid router."""

    route_scale: float
    n_groups: int
    topk_groups: int
    sequence_loss_weight: float = 0.4


def best_experts(scores: list[float], k: int, sigmoid: Sigmoid | None) -> list[int]:
    """Return the k best experts; with groups, of those groups whose two best ones sum highest."""
    allowed = list(range(len(scores)))
    if sigmoid is not None:
        size = len(scores) // sigmoid.n_groups
        groups = [allowed[first : first + size] for first in range(0, len(scores), size)]
        groups.sort(key=lambda group: -sum(sorted(scores[e] for e in group)[-2:]))
        allowed = [e for group in groups[: sigmoid.topk_groups] for e in group]
    return sorted(allowed, key=lambda e: -scores[e])[:k]


def token_loop(
    x: Tensor,
    p: dict[str, Tensor],
    bias: Tensor,
    k: int,
    capacity: int | None,
    keys: dict[str, Any],
    shares: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return output, routing loss, load and drops, one token after the other.

    shares: [E] of the balance loss over the global batch; None: each sequence counts its own.
    """
    n_experts = len(p["router.weight"])
    load = torch.zeros(n_experts)
    act, sigmoid = keys.get("activation", "swiglu"), keys.get("router")
    dropped = 0
    rows, z_terms, balance_terms, sequence_terms = [], [], [], []
    for sequence in x:
        taken, asked = [0] * n_experts, torch.zeros(n_experts, dtype=x.dtype)
        best = torch.zeros(n_experts, dtype=x.dtype)  # by raw scores
        all_probs = []
        for token in sequence:
            logits = p["router.weight"] @ token
            probs = logits.softmax(-1) if sigmoid is None else 1 / (1 + (-logits).exp())
            all_probs.append(probs / probs.sum())
            z_terms.append(logits.logsumexp(-1) ** 2)
            scores = (probs + bias) if keys["balancing"] == "bias" else probs
            chosen = best_experts(scores.tolist(), k, sigmoid)
            total = sum(probs[e] for e in chosen) if keys.get("normalize_gates") else 1.0
            total = total / (sigmoid.route_scale if sigmoid else 1.0)
            for e in best_experts(probs.tolist(), k, None):
                best[e] += 1
            y = torch.zeros_like(token)
            for e in chosen:
                asked[e] += 1
                if capacity is not None and taken[e] == capacity:
                    dropped += 1
                    continue
                taken[e] += 1
                out = feed_forward(token, p["experts.gate_up"][e], p["experts.down"][e], act)
                y = y + probs[e] / total * out
            if "shared.down.weight" in p:
                first, second = p["shared.gate_up.weight"].T, p["shared.down.weight"].T
                y = y + feed_forward(token, first, second, act)
            rows.append(y)
        load += asked.float()
        mean_probs = torch.stack(all_probs).mean(0)
        f = asked / asked.sum() if shares is None else shares
        balance_terms.append(n_experts * (f * mean_probs).sum())
        sequence_terms.append((n_experts / (k * len(sequence)) * best * mean_probs).sum())
    loss = Z * torch.stack(z_terms).mean()
    if keys["balancing"] == "aux_loss":
        loss = loss + AUX * torch.stack(balance_terms).mean()
    if sigmoid is not None:
        loss = loss + sigmoid.sequence_loss_weight * torch.stack(sequence_terms).mean()
    return torch.stack(rows).view_as(x), loss, load, dropped


CASES = [
    {"n_experts_per_token": k, **more}
    for k in (1, 2, 4)
    for more in (
        {"balancing": "aux_loss"},
        {"balancing": "aux_loss", "balance_scope": "sequence"},
        {"balancing": "bias", "n_shared_experts": 2},
        {"balancing": "none", "capacity_factor": 0.75},
        {"balancing": "aux_loss", "capacity_factor": 1.25, "n_shared_experts": 1},
        {"balancing": "bias", "normalize_gates": k > 1, "capacity_factor": 0.5},
        {"balancing": "none", "n_shared_experts": 1, "activation": "geglu"},
        {"balancing": "aux_loss", "n_shared_experts": 1, "activation": "relu2"},
    )
]

CASES += [
    {"n_experts_per_token": 2, "router": Sigmoid(2.5, 1, 1), "balancing": "none"},
    {"n_experts_per_token": 1, "router": Sigmoid(1.0, 2, 1), "balancing": "aux_loss"},
    {
        "n_experts_per_token": 2,
        "router": Sigmoid(2.5, 2, 1),
        "balancing": "bias",
        "normalize_gates": True,
        "n_shared_experts": 1,
    },
    {
        "n_experts_per_token": 4,
        "router": Sigmoid(0.5, 3, 2),
        "balancing": "bias",
        "normalize_gates": True,
        "capacity_factor": 0.75,
    },
    {
        "n_experts_per_token": 2,
        "router": Sigmoid(1.0, 6, 3, 0.0),
        "balancing": "aux_loss",
        "balance_scope": "sequence",
        "activation": "relu2",
    },
]


@pytest.mark.parametrize("product", [Product.LOOP, Product.PADDED], ids=lambda p: p.name)
@pytest.mark.parametrize("keys", CASES, ids=lambda keys: "-".join(map(str, keys.values())))
def test_output_and_every_gradient_equal_a_loop_over_tokens(
    make_layer: MakeLayer,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    product: Product,
) -> None:
    monkeypatch.setattr(experts, "product_for", lambda *_: product)
    monkeypatch.setattr(blocks, "_BALANCED", 4)  # So few that experts need several blocks.
    n_experts, k = 6, keys["n_experts_per_token"]
    router = keys.get("router")
    kind = SigmoidRouterFactory(**vars(router)) if router else SoftmaxRouterFactory()
    layer = make_layer(
        n_experts=n_experts, aux_loss_weight=AUX, router_z_loss_weight=Z, **keys | {"router": kind}
    ).train()
    layer.router.balance_bias.copy_(torch.randn(n_experts) * 0.2)
    layer.router.balance_bias[2] = -9.0
    shares = getattr(layer.router, "load_shares", None)
    if shares is not None:
        layer.update_balance(torch.tensor([3.0, 0.0, 9.0, 1.0, 4.0, 4.0], dtype=torch.float64))
    x = torch.randn(3, 7, 8, requires_grad=True)
    towards = torch.randn(3, 7, 8)

    y, stats = layer(x)
    ((y * towards).sum() + stats.loss).backward()

    p = {n: q.detach().double().requires_grad_() for n, q in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    factor = keys.get("capacity_factor")
    capacity = None if factor is None else math.ceil(factor * 7 * k / n_experts)
    want, loss, load, dropped = token_loop(
        x64, p, layer.router.balance_bias.double(), k, capacity, keys, shares
    )
    ((want * towards.double()).sum() + loss).backward()

    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(y, want, **close)
    torch.testing.assert_close(stats.loss, loss, **close)
    torch.testing.assert_close(stats.load, load)
    assert stats.dropped == dropped
    if factor is None or factor < 1:
        assert (dropped > 0) == (factor is not None)
    if keys["balancing"] == "bias":
        assert load[2] == 0  # an idle expert
    torch.testing.assert_close(x.grad, x64.grad, **close)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, p[name].grad, **close, msg=lambda m, n=name: n + m
        )


def test_an_idle_expert_has_a_gradient_of_zeros(make_layer: MakeLayer) -> None:
    layer = make_layer(balancing="bias")
    layer.router.balance_bias.copy_(torch.tensor([9.0, 0.0, 9.0, 0.0]))
    y, stats = layer(torch.randn(2, 5, 8))
    y.sum().backward()
    assert stats.load[1] == stats.load[3] == 0
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[[1, 3]].any()
        assert parameter.grad[[0, 2]].any(dim=2).any(dim=1).any()


@pytest.mark.parametrize("k", [1, 2])
def test_the_output_alone_trains_the_router(make_layer: MakeLayer, k: int) -> None:
    layer = make_layer(
        n_experts_per_token=k, balancing="none", router_z_loss_weight=0.0, normalize_gates=k > 1
    )
    y, stats = layer(torch.randn(2, 5, 8))
    (y.sum() + stats.loss).backward()
    assert layer.router.weight.grad.abs().max() > 1e-3


def test_without_capacity_a_sequence_does_not_see_another(make_layer: MakeLayer) -> None:
    layer = make_layer(n_experts_per_token=2)
    x = torch.randn(3, 6, 8)
    other = x.clone()
    other[1] = torch.randn(6, 8)
    torch.testing.assert_close(layer(x)[0][[0, 2]], layer(other)[0][[0, 2]])


def test_evaluation_never_drops(make_layer: MakeLayer) -> None:
    tight = make_layer(capacity_factor=0.25).eval()
    free = make_layer().eval()
    x = torch.randn(2, 8, 8)
    y, stats = tight(x)
    assert stats.dropped == 0
    torch.testing.assert_close(y, free(x)[0])
    assert tight.train()(x)[1].dropped > 0


def test_a_dropped_token_gets_nothing(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity_factor=0.5, balancing="bias").train()
    layer.router.balance_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    y, stats = layer(torch.randn(1, 8, 8))  # one expert is asked by all, and takes one
    assert stats.dropped == 7
    assert y[0, 0].any() and not y[0, 1:].any()


def test_statistics_are_without_a_gradient_but_for_the_loss(make_layer: MakeLayer) -> None:
    _, stats = make_layer(capacity_factor=1.0).train()(torch.randn(1, 4, 8))
    assert stats.loss.requires_grad
    assert not stats.load.requires_grad and not stats.dropped.requires_grad


def test_bf16_routes_in_float32(make_layer: MakeLayer) -> None:
    layer = make_layer(n_experts_per_token=2)
    x = torch.randn(2, 5, 8)
    y, stats = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y16, stats16 = layer(x)
    torch.testing.assert_close(stats16.loss, stats.loss, rtol=0, atol=0)
    torch.testing.assert_close(stats16.load, stats.load)
    torch.testing.assert_close(y16, y, rtol=0.05, atol=0.05)
    assert not torch.equal(y16, y)


def test_idle_parameters_are_the_experts_not_chosen(make_layer: MakeLayer) -> None:
    layer = make_layer(n_experts=4, n_experts_per_token=1, n_shared_experts=1)
    one = (layer.experts.gate_up[0].numel()) + layer.experts.down[0].numel()
    assert layer.idle_parameters() == 3 * one


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=["grouped", "padded"])
@pytest.mark.parametrize("factor", [1.0, None])
def test_no_gpu_path_waits_for_the_device(
    make_layer: MakeLayer,
    take_gpu: Callable[[tuple[int, int]], None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    factor: float | None,
) -> None:
    """A fake tensor has no values: what would fetch one to the host raises."""
    take_gpu(capability)
    # What an operator does to real tensors, not only the shapes that it states.
    for module, name in ((padded, "block_product"), (experts, "product_each")):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        layer = make_layer(
            n_experts_per_token=2, capacity_factor=factor, expert_hidden_multiplier=3.0
        )
        x = torch.randn(2, 4, 8, requires_grad=True)
        y, stats = layer(x)
        (y.sum() + stats.loss).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        monkeypatch.setattr(experts, "product_for", lambda *_: Product.LOOP)
        with pytest.raises(DataDependentOutputException):
            layer(x)
