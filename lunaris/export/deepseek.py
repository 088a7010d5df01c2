"""DeepSeek-V2 and V3: latent attention, dense or routed by softmax (V2) or sigmoid (V3). No torch.

Shapes: H heads; widths of a head: N part without positions, R rotary part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lunaris.export.dots1 import routed, routing_fields
from lunaris.export.family import Family
from lunaris.export.settings import Settings
from lunaris.export.weights import Weight, block_norms, dense, outer

if TYPE_CHECKING:
    from torch import Tensor


def deepseek_v2(settings: Settings) -> Family:
    """Return how a model of latent attention and softmax-routed experts is written."""
    config = _fields(settings) | {
        "model_type": "deepseek_v2",
        "topk_method": "greedy",
        "mlp_bias": False,
    }
    return Family("DeepseekV2ForCausalLM", config, tuple(_weights(settings, bias=False)))


def deepseek_v3(settings: Settings) -> Family:
    """Return how a model of latent attention, dense or with sigmoid-routed experts, is written."""
    config = _fields(settings) | {
        "model_type": "deepseek_v3",
        "rope_interleave": True,
        # The modules of multi-token prediction are left out.
        "num_nextn_predict_layers": 0,
    }
    return Family("DeepseekV3ForCausalLM", config, tuple(_weights(settings, bias=True)))


def _fields(settings: Settings) -> dict[str, object]:
    assert settings.mla is not None
    widths = settings.latent
    return (
        settings.common()
        | routing_fields(settings)
        | {
            "q_lora_rank": settings.mla.q_lora_rank,
            "kv_lora_rank": widths.latent,
            "qk_nope_head_dim": widths.nope,
            "qk_rope_head_dim": widths.rope,
            "qk_head_dim": widths.nope + widths.rope,
            "v_head_dim": widths.value,
            "head_dim": widths.rope,
        }
    )


def _weights(settings: Settings, *, bias: bool) -> Iterator[Weight]:
    yield from outer(settings)
    for layer in range(settings.n_layers):
        yield from block_norms(layer)
        yield from _attention(settings, layer)
        if layer < settings.first_dense:
            yield from dense(settings, layer)
        else:
            yield from routed(settings, layer, bias=bias)


def _attention(settings: Settings, layer: int) -> Iterator[Weight]:
    """Yield the projections; these classes rotate neighbouring pairs, where ours are half-split."""
    assert settings.mla is not None
    widths, n_heads = settings.latent, settings.cfg.model.n_heads
    scores = settings.cfg.model.width_factors().scores
    name, source = f"model.layers.{layer}.self_attn", f"blocks.{layer}.attention"

    def queries(matrix: Tensor) -> Tensor:
        heads = matrix.unflatten(0, (n_heads, widths.nope + widths.rope))
        rows = _neighbours(heads, widths.rope).flatten(0, 1)
        return rows if scores == 1 else rows * scores

    def latents(matrix: Tensor) -> Tensor:
        return _neighbours(matrix[None], widths.rope)[0]

    if settings.mla.q_lora_rank:
        yield Weight(f"{name}.q_a_proj.weight", f"{source}.q_a.weight")
        yield Weight(f"{name}.q_a_layernorm.weight", f"{source}.q_norm.weight")
    last = "q_b_proj" if settings.mla.q_lora_rank else "q_proj"
    # A product with a factor is not rounded again in a folder of another dtype.
    exact = scores != 1
    yield Weight(f"{name}.{last}.weight", f"{source}.q_b.weight", queries, float32=exact)
    yield Weight(f"{name}.kv_a_proj_with_mqa.weight", f"{source}.kv_a.weight", latents)
    yield Weight(f"{name}.kv_a_layernorm.weight", f"{source}.kv_norm.weight")
    yield Weight(f"{name}.kv_b_proj.weight", f"{source}.kv_b.weight")
    yield Weight(f"{name}.o_proj.weight", f"{source}.out.weight")


def _neighbours(heads: Tensor, rope: int) -> Tensor:
    """Move rotary rows i and i + R/2 of each head next to each other; heads: [H, N + R, …]."""
    rows = heads.clone()
    rotary = heads[:, -rope:]
    rows[:, -rope::2] = rotary[:, : rope // 2]
    rows[:, 1 - rope :: 2] = rotary[:, rope // 2 :]
    return rows
