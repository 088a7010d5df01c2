"""Qwen3 and Qwen3-MoE: pre-norm, dense or routed by softmax without shared experts. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from lunaris.export.family import Family
from lunaris.export.settings import Settings
from lunaris.export.weights import Weight, block_norms, dense, experts, grouped_query, outer


def qwen3(settings: Settings) -> Family:
    """Return how a dense model is written; its layers may have different windows."""
    window = next((w for w in settings.windows if w is not None), None)
    config = settings.common() | {
        "model_type": "qwen3",
        "head_dim": settings.head_dim,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types(settings),
    }
    return Family("Qwen3ForCausalLM", config, tuple(_weights(settings)))


def qwen3_moe(settings: Settings) -> Family:
    """Return how a model of softmax-routed experts is written; one window serves all layers."""
    moe = settings.moe
    assert moe is not None
    window = settings.windows[0]
    config = settings.common() | {
        "model_type": "qwen3_moe",
        "head_dim": settings.head_dim,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # Newer readers take the second name, older ones the first.
        "num_experts": moe.n_experts,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.n_experts_per_token,
        "moe_intermediate_size": settings.expert_hidden,
        "norm_topk_prob": moe.normalize_gates,
        "mlp_only_layers": list(range(settings.first_dense)),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
    }
    return Family("Qwen3MoeForCausalLM", config, tuple(_weights(settings)))


def layer_types(settings: Settings) -> list[str]:
    """Return how each layer attends, in the words of transformers."""
    return ["full_attention" if w is None else "sliding_attention" for w in settings.windows]


def _weights(settings: Settings) -> Iterator[Weight]:
    yield from outer(settings)
    for layer in range(settings.n_layers):
        yield from block_norms(layer)
        yield from grouped_query(settings, layer)
        part = dense if layer < settings.first_dense else experts
        yield from part(settings, layer)
