"""The tensors of an exported folder, each made from one tensor of the checkpoint. No torch.

Shapes: D model width, H hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunaris.export.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Weight:
    """One tensor on disk: its name there, the checkpoint's tensor and what is made of that.

    make takes any device, also meta, which gives the shape. float32: stays so in a folder of
    another dtype.
    """

    name: str
    source: str
    make: Callable[[Tensor], Tensor] = _same
    float32: bool = False


def rows(start: int, end: int | None = None) -> Callable[[Tensor], Tensor]:
    """Return what takes the rows [start, end) of a matrix."""
    return lambda tensor: tensor[start:end]


def times(factor: float, name: str, source: str) -> Weight:
    """Return the weights of a norm, with the factor of its output multiplied into them.

    A product with a factor is not rounded again in a folder of another dtype.
    """
    if factor == 1:
        return Weight(name, source)
    return Weight(name, source, lambda tensor: tensor * factor, float32=True)


def outer(settings: Settings) -> Iterator[Weight]:
    """Yield the embedding, the last norm and an untied head."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    logits = settings.cfg.model.width_factors().logits
    yield times(logits, "model.norm.weight", "norm.weight")
    if not settings.cfg.model.tie_embeddings:
        yield Weight("lm_head.weight", "head.weight")


def block_norms(layer: int) -> Iterator[Weight]:
    """Yield the norms before attention and the feed-forward of a pre-norm block."""
    name, source = f"model.layers.{layer}", f"blocks.{layer}"
    yield Weight(f"{name}.input_layernorm.weight", f"{source}.attention_norm.weight")
    yield Weight(f"{name}.post_attention_layernorm.weight", f"{source}.feed_forward_norm.weight")


def grouped_query(settings: Settings, layer: int) -> Iterator[Weight]:
    """Yield the projections, split, and the norms of queries and keys.

    The rotary pairs are half-split in both, so no row moves.
    """
    name, source = f"model.layers.{layer}.self_attn", f"blocks.{layer}.attention"
    queries, keys = settings.cfg.model.d_model, settings.kv_rows
    yield Weight(f"{name}.q_proj.weight", f"{source}.qkv.weight", rows(0, queries))
    yield Weight(f"{name}.k_proj.weight", f"{source}.qkv.weight", rows(queries, queries + keys))
    yield Weight(f"{name}.v_proj.weight", f"{source}.qkv.weight", rows(queries + keys))
    yield Weight(f"{name}.o_proj.weight", f"{source}.out.weight")
    scores = settings.cfg.model.width_factors().scores
    yield times(scores, f"{name}.q_norm.weight", f"{source}.q_norm.weight")
    yield Weight(f"{name}.k_norm.weight", f"{source}.k_norm.weight")


def feed_forward(name: str, source: str, hidden: int) -> Iterator[Weight]:
    """Yield a dense feed-forward of width `hidden`, whose fused rows hold the gate's first."""
    yield Weight(f"{name}.gate_proj.weight", f"{source}.gate_up.weight", rows(0, hidden))
    yield Weight(f"{name}.up_proj.weight", f"{source}.gate_up.weight", rows(hidden))
    yield Weight(f"{name}.down_proj.weight", f"{source}.down.weight")


def dense(settings: Settings, layer: int) -> Iterator[Weight]:
    """Yield the feed-forward of a dense layer."""
    source = f"blocks.{layer}.feed_forward.swiglu"
    yield from feed_forward(f"model.layers.{layer}.mlp", source, settings.dense_hidden)


def experts(settings: Settings, layer: int) -> Iterator[Weight]:
    """Yield the router's matrix and each expert's three, as `save_pretrained` writes them.

    The checkpoint stacks them, [E, D, 2H] and [E, H, D]; on disk they are listed and transposed.
    """
    assert settings.moe is not None
    name, source = f"model.layers.{layer}.mlp", f"blocks.{layer}.feed_forward"
    yield Weight(f"{name}.gate.weight", f"{source}.router.weight")
    hidden = settings.expert_hidden
    for part, stack, columns in (
        ("gate_proj", "gate_up", slice(0, hidden)),
        ("up_proj", "gate_up", slice(hidden, None)),
        ("down_proj", "down", slice(None)),
    ):
        for expert in range(settings.moe.n_experts):
            yield Weight(
                f"{name}.experts.{expert}.{part}.weight",
                f"{source}.experts.{stack}",
                _expert(expert, columns),
            )


def _expert(expert: int, columns: slice) -> Callable[[Tensor], Tensor]:
    return lambda stacked: stacked[expert, :, columns].mT


def shared_experts(settings: Settings, layer: int, name: str) -> Iterator[Weight]:
    """Yield the shared experts, which together are one feed-forward; `name`: that of theirs."""
    assert settings.moe is not None
    width = settings.moe.n_shared_experts * settings.expert_hidden
    source = f"blocks.{layer}.feed_forward.shared"
    yield from feed_forward(f"model.layers.{layer}.mlp.{name}", source, width)
