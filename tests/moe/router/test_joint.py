"""A router from outside the package: named by its dotted path, with its own key."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lunaris.config.instantiate import locate
from lunaris.model.roles import Role, parameter_roles
from lunaris.moe.router.base import RoutingSpec

MakeLayer = Callable[..., nn.Module]
TOY = '''
import torch
from torch import nn

from lunaris.model.roles import Role
from lunaris.moe.balance import sequence_counts
from lunaris.moe.router.base import Router, Routing


class Factory:
    def __init__(self, *, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, layer, shape, spec):
        return Shifted(layer, shape.d_model, spec, self.temperature)


class Shifted(Router):
    """Position p takes the experts p + layer, p + layer + 1, …; one learned gate for all."""

    def __init__(self, layer, d_model, spec, temperature):
        super().__init__()
        self.layer, self.spec, self.temperature = layer, spec, temperature
        self.gate = nn.Linear(d_model, 1, bias=False)
        self.loads = []

    def forward(self, x):
        at = torch.arange(x.size(1))[:, None] + torch.arange(self.spec.n_experts_per_token)
        experts = ((at + self.layer) % self.spec.n_experts).expand(x.size(0), -1, -1)
        gates = (self.gate(x.float()) / self.temperature).sigmoid().expand(experts.shape)
        counts = sequence_counts(experts, self.spec.n_experts)
        return Routing(experts, gates, 0.5 * gates.mean(), counts.sum(0))

    def update_balance(self, load):
        self.loads.append(load)

    def parameter_roles(self):
        return {"gate.weight": Role.ROUTER}
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the factory, built from its dotted path and its key as a config would."""
    (tmp_path / "toy_router.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    yield locate("moe.router._target_", "toy_router.Factory")(temperature=2.0)
    sys.modules.pop("toy_router")


def test_the_layer_takes_its_choice_gates_and_loss(make_layer: MakeLayer, toy: Any) -> None:
    layer = make_layer(router=toy, n_experts_per_token=2)
    x = torch.randn(3, 8, 8)
    y, stats = layer(x)
    experts, gate = layer.experts, (layer.router.gate(x) / 2.0).sigmoid()
    for position in range(8):
        want = torch.zeros(3, 8)
        for choice in (position % 4, (position + 1) % 4):
            up, gated = (x[:, position] @ experts.gate_up[choice]).chunk(2, dim=-1)[::-1]
            want += (nn.functional.silu(gated) * up) @ experts.down[choice]
        torch.testing.assert_close(y[:, position], want * gate[:, position], rtol=1e-4, atol=1e-5)
    assert stats.load.tolist() == [12.0] * 4
    torch.testing.assert_close(stats.loss, 0.5 * gate.mean())
    (y.sum() + stats.loss).backward()
    assert layer.router.gate.weight.grad.abs().max() > 1e-3


def test_it_gets_the_keys_the_load_and_its_role(make_layer: MakeLayer, toy: Any) -> None:
    layer = make_layer(router=toy, normalize_gates=True, n_experts_per_token=2, balancing="none")
    assert layer.router.spec == RoutingSpec(
        n_experts=4,
        n_experts_per_token=2,
        balancing="none",
        balance_scope="global",
        aux_loss_weight=0.01,
        router_z_loss_weight=0.001,
        bias_update_rate=0.001,
        normalize_gates=True,
    )
    assert parameter_roles(layer)["router.gate.weight"] == Role.ROUTER
    load = torch.ones(4)
    layer.update_balance(load)
    assert layer.router.loads == [load]


def test_capacity_applies_to_its_choice(make_layer: MakeLayer, toy: Any) -> None:
    layer = make_layer(router=toy, capacity_factor=0.5)
    _, stats = layer(torch.randn(2, 8, 8))
    assert stats.dropped == 8  # one of an expert's two assignments in each sequence
