"""The outputs that selective activation checkpointing keeps of a block (`lunaris.model.recompute`).

No torch. Legend as in `lunaris.planning.activations`.
"""

from __future__ import annotations

from lunaris.config.schema.attention import GQAConfig, MLAConfig
from lunaris.config.schema.moe import MoEConfig
from lunaris.config.widths import GATED, first_columns
from lunaris.planning.parameters import dense_width, expert_width, mla_widths, routes
from lunaris.planning.sizes import Sizes, attention_shape, expert_blocks, has_ranges, local_experts


def kept_outputs(at: Sizes, layer: int) -> int:
    """Return the bytes of the products and of the attention of a block, or of a predictor."""
    if at.cfg.trainer.activation_checkpointing != "selective":
        return 0
    model = at.cfg.model
    projection = model.d_model if layer >= model.n_layers else 0  # Of a predictor's two inputs.
    attention = _mla if isinstance(at.cfg.attention, MLAConfig) else _gqa
    total = at.input(projection) + attention(at, layer) + at.input(model.d_model)
    if routes(at.cfg, layer):
        return total + _experts(at)
    return total + _feed_forward(at, at.tokens, dense_width(at.cfg))


def _feed_forward(at: Sizes, rows: int, hidden: int) -> int:
    columns = first_columns(GATED[at.cfg.model.activation], hidden)
    return rows * at.product * (columns + at.cfg.model.d_model)


def _experts(at: Sizes) -> int:
    moe = at.cfg.moe
    assert isinstance(moe, MoEConfig)
    rows = at.tokens * moe.n_experts_per_token
    if at.padded:
        rows = expert_blocks(at.cfg, at.length).total(local_experts(at.cfg))
    total = 4 * at.tokens * moe.n_experts + _feed_forward(at, rows, expert_width(at.cfg))
    if moe.n_shared_experts:
        width = moe.n_shared_experts * expert_width(at.cfg)
        total += _feed_forward(at, at.tokens, width)
    return total


def _gqa(at: Sizes, layer: int) -> int:
    model, keys = at.cfg.model, at.cfg.attention
    assert isinstance(keys, GQAConfig)
    width = model.d_model // model.n_heads
    projections = model.d_model + 2 * model.n_kv_heads * width
    return at.input(projections) + _attend(at, width, keys, has_ranges(at, layer))


def _mla(at: Sizes, layer: int) -> int:
    model, keys, widths = at.cfg.model, at.cfg.attention, mla_widths(at.cfg)
    assert isinstance(keys, MLAConfig)
    head = widths.nope + widths.rope
    projections = (
        (keys.q_lora_rank or 0)
        + model.n_heads * head
        + widths.latent
        + widths.rope
        + model.n_heads * (widths.nope + widths.value)
    )
    widest = max(head, widths.value)
    return at.input(projections) + _attend(at, widest, keys, has_ranges(at, layer))


def _attend(at: Sizes, width: int, keys: GQAConfig | MLAConfig, ranged: bool) -> int:
    """Return the output of the attention kernel, its normalisers, and the output gate's product."""
    gate = at.input(at.cfg.model.n_heads) if keys.output_gate else 0
    if at.cfg.model.dropout:
        return gate  # A kernel that draws is run again.
    n_queries, _, wide = attention_shape(at, width, keys.sinks, ranged)
    return gate + at.sequences * at.cfg.model.n_heads * n_queries * (at.product * wide + 4)
