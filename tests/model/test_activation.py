"""The activations of a feed-forward against float64, and the widths that they give."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lunaris.model.activation import ACTIVATIONS
from lunaris.model.layers import FeedForward
from lunaris.model.transformer import Transformer

# One column of the papers' formulas each: value and derivative, by scalar arithmetic.
FORMULAS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "swiglu": (
        lambda g: g / (1 + math.exp(-g)),
        lambda g: (1 + math.exp(-g) + g * math.exp(-g)) / (1 + math.exp(-g)) ** 2,
    ),
    "geglu": (
        lambda g: g * (1 + math.erf(g / math.sqrt(2))) / 2,
        lambda g: (
            (1 + math.erf(g / math.sqrt(2))) / 2 + g * math.exp(-g * g / 2) / math.sqrt(2 * math.pi)
        ),
    ),
    "relu2": (lambda u: max(u, 0.0) ** 2, lambda u: 2 * max(u, 0.0)),
}
names = pytest.mark.parametrize("name", ACTIVATIONS)


def by_hand(x: Tensor, first: Tensor, down: Tensor, grad: Tensor, name: str) -> list[Tensor]:
    """Return the output and the gradients of x and both weights ([H or 2H, D] and [D, H]).

    x, grad: [T, D]; everything in float64.
    """
    value, slope = (
        lambda t, f=f: torch.tensor([[f(float(v)) for v in row] for row in t], dtype=t.dtype)
        for f in FORMULAS[name]
    )
    z = x @ first.T
    grad_h = grad @ down
    if name == "relu2":
        h, grad_z = value(z), grad_h * slope(z)
    else:
        gate, up = z.chunk(2, dim=1)
        h = value(gate) * up
        grad_z = torch.cat([grad_h * up * slope(gate), grad_h * value(gate)], dim=1)
    return [h @ down.T, grad_z @ first, grad_z.T @ x, grad.T @ h]


@names
def test_output_and_every_gradient_are_those_of_the_formula(name: str) -> None:
    torch.manual_seed(0)
    layer = FeedForward(6, 5, ACTIVATIONS[name])
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, grad = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)
    y = layer(x)
    y.backward(grad)
    doubles = [t.detach().double() for t in (x, layer.gate_up.weight, layer.down.weight, grad)]
    want = by_hand(*doubles, name)
    found = [y, x.grad, layer.gate_up.weight.grad, layer.down.weight.grad]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("multiple_of", [2, 8, 32, 256])
@pytest.mark.parametrize("multiplier", [1.0, 2.5, 4.0])
def test_every_activation_has_as_many_parameters(multiplier: float, multiple_of: int) -> None:
    counts = set()
    for activation in ACTIVATIONS.values():
        hidden = activation.hidden_width(24, multiplier, multiple_of)
        layer = FeedForward(24, hidden, activation)
        counts.add(sum(p.numel() for p in layer.parameters()))
    assert len(counts) == 1


def test_without_a_gate_the_width_is_half_as_much_again() -> None:
    widths = {name: a.hidden_width(128, 4.0, 32) for name, a in ACTIVATIONS.items()}
    assert widths == {"swiglu": 352, "geglu": 352, "relu2": 528}
    assert ACTIVATIONS["relu2"].hidden_width(3, 1.0, 1) == 3  # an odd width is rounded up


EXPERTS = {"n_shared_experts": 1, "expert_hidden_multiplier": 4.0}


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_counts_and_flops_are_the_same_and_losses_differ(
    make_model: Callable[..., Transformer], moe: dict[str, float] | None
) -> None:
    models = [make_model(moe, activation=name) for name in ACTIVATIONS]
    assert len({model.count_parameters() for model in models}) == 1
    assert len({model.flops_per_token(24) for model in models}) == 1
    tokens = torch.arange(12)[None]
    a, b, c = (model.logits(tokens) for model in models)
    assert not torch.allclose(a, b) and not torch.allclose(a, c)


@names
def test_roles_decide_the_initial_sizes(make_model: Callable[..., Transformer], name: str) -> None:
    moe = {"n_shared_experts": 1, "first_dense_layers": 1}
    keys = {"d_model": 64, "n_layers": 2, "vocab_size": 50}
    model = make_model(moe, seed=None, activation=name, **keys)
    model.init_weights(0)
    dense, routed = (block.feed_forward for block in model.blocks)
    for weight in (
        dense.swiglu.gate_up.weight,
        routed.experts.gate_up,
        routed.shared.gate_up.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (dense.swiglu.down.weight, routed.experts.down, routed.shared.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
