"""Small attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lunaris.model.attention.base import Attention
from lunaris.model.layers import ModelShape


@pytest.fixture
def make_attention() -> Callable[..., Attention]:
    """Return a function from a class and its keys to an attention (width 24) of random weights."""

    def make(kind: type, *, norm: str, n_kv_heads: int, **keys: Any) -> Attention:
        shape = ModelShape(
            d_model=24,
            n_layers=1,
            n_heads=6,
            n_kv_heads=n_kv_heads,
            max_seq_len=16,
            rope_theta=10.0,
            dropout=0.0,
            ffn_hidden_multiplier=1.0,
            multiple_of=1,
            norm=norm,
        )
        torch.manual_seed(0)
        attention: Attention = kind(shape, **keys)
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.5)
        return attention

    return make
