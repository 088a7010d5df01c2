"""Small transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.layers import ModelShape
from lunaris.model.transformer import Transformer
from lunaris.moe.factory import DenseFactory, MoEFactory
from lunaris.moe.router.softmax import SoftmaxRouterFactory

SHAPE = ModelShape(
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    max_seq_len=24,
    rope_theta=10000.0,
    dropout=0.0,
    ffn_hidden_multiplier=2.0,
    multiple_of=8,
    norm="qk_reorder",
)


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    """Return a function from keys of `model`, and `moe` (None: dense), to a model with weights."""

    def make(
        moe: dict[str, Any] | None = None, *, seed: int | None = 0, **keys: Any
    ) -> Transformer:
        routed = {"router": SoftmaxRouterFactory(), "n_experts": 4, "n_experts_per_token": 2}
        factory = DenseFactory() if moe is None else MoEFactory(**routed | moe)
        parts = {
            "vocab_size": 40,
            "tie_embeddings": True,
            "attention": GQAFactory(),
            "feed_forward": factory,
            "predictors": (),
            "activation_checkpointing": "none",
        }
        parts |= {key: keys.pop(key) for key in parts.keys() & keys.keys()}
        model = Transformer(replace(SHAPE, **keys), **parts)
        if seed is not None:
            model.init_weights(seed)
            for parameter in model.parameters():  # far from zero, so that differences show
                parameter.data.mul_(10.0 if parameter.ndim > 1 else 1.0)
        return model

    return make
