"""What the `moe` group builds for each layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lunaris.model.layers import ModelShape
from lunaris.moe.factory import Dense, DenseFactory, MoEFactory
from lunaris.moe.layer import MoE
from lunaris.moe.router.softmax import SoftmaxRouterFactory

SHAPE = ModelShape(
    d_model=12,
    n_layers=3,
    n_heads=2,
    n_kv_heads=2,
    max_seq_len=64,
    rope_theta=10000.0,
    dropout=0.0,
    ffn_hidden_multiplier=4.0,
    multiple_of=8,
    norm="pre",
)


def test_the_first_layers_are_dense() -> None:
    factory = MoEFactory(
        router=SoftmaxRouterFactory(), n_experts=4, n_experts_per_token=1, first_dense_layers=2
    )
    assert [type(factory(layer, SHAPE)) for layer in range(3)] == [Dense, Dense, MoE]


def test_widths_are_two_thirds_rounded_up() -> None:
    dense = DenseFactory()(0, SHAPE)
    assert dense.swiglu.down.in_features == 32  # 2/3 · 4 · 12
    layer = MoEFactory(
        router=SoftmaxRouterFactory(),
        n_experts=4,
        n_experts_per_token=2,
        n_shared_experts=2,
        expert_hidden_multiplier=1.5,
    )(0, SHAPE)
    assert layer.experts.gate_up.shape == (4, 12, 2 * 16)  # 2/3 · 1.5 · 12 = 12, up to 16
    assert layer.shared.down.in_features == 2 * 16


@pytest.mark.parametrize(("activation", "dense"), [("swiglu", 32), ("relu2", 48)])
@pytest.mark.parametrize(("k", "n_shared", "width"), [(1, 0, 1), (2, 0, 2), (3, 1, 4), (3, 0, 3)])
def test_the_experts_of_a_token_are_as_wide_as_the_dense_feed_forward(
    activation: str, dense: int, k: int, n_shared: int, width: int
) -> None:
    shape = replace(SHAPE, activation=activation)
    layer = MoEFactory(
        router=SoftmaxRouterFactory(), n_experts=4, n_experts_per_token=k, n_shared_experts=n_shared
    )(0, shape)
    hidden = layer.experts.down.size(1)
    assert hidden % 8 == 0 and dense <= (k + n_shared) * hidden < dense + 8 * width
    if n_shared:
        assert layer.shared.down.in_features == n_shared * hidden


def test_a_dense_layer_has_no_statistics() -> None:
    y, stats = DenseFactory()(0, SHAPE)(torch.randn(2, 3, 12))
    assert y.shape == (2, 3, 12) and stats is None
