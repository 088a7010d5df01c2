"""Dots1: pre-norm, experts chosen by sigmoid, with a bias and shared experts by choice. No torch.

Its experts are those of DeepSeek-V3, and its attention is that of Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterator

from lunaris.export.family import Family
from lunaris.export.qwen3 import layer_types
from lunaris.export.settings import Settings
from lunaris.export.weights import (
    Weight,
    block_norms,
    dense,
    experts,
    grouped_query,
    outer,
    shared_experts,
)


def dots1(settings: Settings) -> Family:
    """Return how a model of sigmoid-routed experts with grouped-query attention is written."""
    window = next((w for w in settings.windows if w is not None), None)
    config = settings.common() | {
        "model_type": "dots1",
        "head_dim": settings.head_dim,
        "sliding_window": window,
        "layer_types": layer_types(settings),
        **routing_fields(settings),
    }
    return Family("Dots1ForCausalLM", config, tuple(_weights(settings)))


def routing_fields(settings: Settings) -> dict[str, object]:
    """Return the fields of the experts that Dots1, DeepSeek-V2 and DeepSeek-V3 share."""
    moe, router = settings.moe, settings.sigmoid
    if moe is None:  # No layer routes, but the fields are read.
        return {
            "n_routed_experts": 1,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": settings.dense_hidden,
            "first_k_dense_replace": settings.n_layers,
            "n_group": 1,
            "topk_group": 1,
        }
    grouped = router is not None and router.topk_groups < router.n_groups
    return {
        "n_routed_experts": moe.n_experts,
        "n_shared_experts": moe.n_shared_experts,
        "num_experts_per_tok": moe.n_experts_per_token,
        "moe_intermediate_size": settings.expert_hidden,
        "first_k_dense_replace": settings.first_dense,
        "norm_topk_prob": moe.normalize_gates,
        "routed_scaling_factor": router.route_scale if router else 1.0,
        "n_group": router.n_groups if router and grouped else 1,
        "topk_group": router.topk_groups if router and grouped else 1,
    }


def routed(settings: Settings, layer: int, *, bias: bool) -> Iterator[Weight]:
    """Yield the experts of a layer, with the bias of their choice if `bias`."""
    yield from experts(settings, layer)
    yield from without_listed_experts(settings, layer, bias=bias)


def without_listed_experts(settings: Settings, layer: int, *, bias: bool) -> Iterator[Weight]:
    """Yield what `routed` does after the router's matrix and the routed experts."""
    assert settings.moe is not None
    name, source = f"model.layers.{layer}.mlp", f"blocks.{layer}.feed_forward"
    if bias:
        yield Weight(
            f"{name}.gate.e_score_correction_bias",
            f"{source}.router.balance_bias",
            float32=True,
        )
    if settings.moe.n_shared_experts:
        yield from shared_experts(settings, layer, "shared_experts")
        return
    # The class always has shared experts; without one, they are of width 0.
    for part in ("gate_proj", "up_proj"):
        yield Weight(
            f"{name}.shared_experts.{part}.weight", f"{source}.router.weight", lambda x: x[:0]
        )
    yield Weight(
        f"{name}.shared_experts.down_proj.weight", f"{source}.router.weight", lambda x: x[:0].mT
    )


def _weights(settings: Settings) -> Iterator[Weight]:
    yield from outer(settings)
    for layer in range(settings.n_layers):
        yield from block_norms(layer)
        yield from grouped_query(settings, layer)
        if layer < settings.first_dense:
            yield from dense(settings, layer)
        else:
            yield from routed(settings, layer, bias=True)
