"""A class of ours, shipped with the folder, for what no stock class computes. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from lunaris.export.dots1 import routing_fields, without_listed_experts
from lunaris.export.family import Family
from lunaris.export.qwen3 import layer_types
from lunaris.export.settings import Settings
from lunaris.export.weights import Weight, block_norms, dense, grouped_query, outer

_CODE = "modeling_lunaris.py"


def own_class(settings: Settings) -> Family:
    """Return how a model is written for `lunaris/export/shipped/modeling_lunaris.py`."""
    window = next((w for w in settings.windows if w is not None), None)
    config = settings.common() | {
        "model_type": "lunaris_codex",
        "auto_map": {
            "AutoConfig": "modeling_lunaris.LunarisConfig",
            "AutoModelForCausalLM": "modeling_lunaris.LunarisForCausalLM",
        },
        "head_dim": settings.head_dim,
        "sliding_window": window,
        "layer_types": layer_types(settings),
        "norm_placement": settings.cfg.model.norm,
        "router_scores": "sigmoid" if settings.sigmoid else "softmax",
        **routing_fields(settings),
    }
    return Family("LunarisForCausalLM", config, tuple(_weights(settings)), (_CODE,))


def _weights(settings: Settings) -> Iterator[Weight]:
    pre = settings.cfg.model.norm == "pre"
    yield from outer(settings)
    for layer in range(settings.n_layers):
        norms = list(block_norms(layer))
        yield from norms if pre else norms[1:]
        yield from grouped_query(settings, layer)
        if layer < settings.first_dense:
            yield from dense(settings, layer)
        else:
            yield from _stacked(layer)
            yield from without_listed_experts(settings, layer, bias=True)


def _stacked(layer: int) -> Iterator[Weight]:
    """Yield the experts as the class holds them: a custom model type gets no conversion."""
    name, source = f"model.layers.{layer}.mlp", f"blocks.{layer}.feed_forward"
    yield Weight(f"{name}.gate.weight", f"{source}.router.weight")
    for part, stack in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
        yield Weight(f"{name}.experts.{part}", f"{source}.experts.{stack}", lambda x: x.mT)
