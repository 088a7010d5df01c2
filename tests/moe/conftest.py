"""Small Mixture-of-Experts layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lunaris.model.layers import ModelShape
from lunaris.moe import experts
from lunaris.moe.factory import MoEFactory
from lunaris.moe.router.softmax import SoftmaxRouterFactory

SHAPE = ModelShape(
    d_model=8,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    max_seq_len=64,
    rope_theta=10000.0,
    dropout=0.0,
    ffn_hidden_multiplier=2.0,
    multiple_of=4,
    norm="pre",
)


@pytest.fixture
def take_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Return a function that makes experts choose as on a GPU of a compute capability."""
    real = experts.product_for

    def take(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(
            experts, "product_for", lambda _, *rest: real(torch.device("cuda"), *rest)
        )

    return take


@pytest.fixture
def make_layer() -> Callable[..., nn.Module]:
    """Return a function from keys of the `moe` group to a layer (width 8) with random weights."""

    def make(*, activation: str = "swiglu", **keys: Any) -> nn.Module:
        torch.manual_seed(0)
        keys = {"router": SoftmaxRouterFactory(), "n_experts": 4, "n_experts_per_token": 1} | keys
        layer = MoEFactory(**keys)(0, replace(SHAPE, activation=activation))
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer

    return make
