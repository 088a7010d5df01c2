"""The bytes that a forward keeps for its backward, from a config's keys. No torch.

On a CPU, without dropout and without activation checkpointing, they equal what autograd saves, to
the byte (`tests/planning/test_activations.py`); a dropless layer of experts is counted as if no
assignment were dropped. On a GPU a norm keeps no normalised copy, and without a kernel for products
of several experts they keep rows of padding as well. The attention kernel reads grouped keys and
values as they are on a GPU in half precision, and on a CPU in float32.

Legend: T tokens of a micro-step, B sequences, L positions, D model width, H heads, G key-value
heads, K head width, E experts, k experts a token. Sizes are bytes: 4 for float32, 2 for products in
half precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lunaris.config.schema.attention import GQAConfig, MLAConfig
from lunaris.config.schema.moe import MoEConfig, SigmoidRouterConfig
from lunaris.config.schema.root import Config
from lunaris.config.widths import GATED, first_columns
from lunaris.planning.kept import kept_outputs
from lunaris.planning.parameters import (
    Kind,
    Parameter,
    dense_width,
    expert_width,
    mla_widths,
    predictors,
    routes,
    window_of,
)
from lunaris.planning.sizes import Sizes, attention_shape, expert_blocks, has_ranges, local_experts


@dataclass(frozen=True)
class Saved:
    """What one micro-step keeps: bytes of every block (predictors last), of the rest, in all."""

    blocks: list[int]
    rest: int

    @property
    def total(self) -> int:
        """The bytes of the whole micro-step."""
        return sum(self.blocks) + self.rest


def saved_activations(
    cfg: Config,
    parameters: list[Parameter],
    *,
    gpu: bool = False,
    sharded: bool = False,
    padded: bool = False,
) -> Saved:
    """Return the bytes that one micro-step of `trainer.batch_size` sequences keeps in a process.

    parameters: of `model_parameters`. gpu: on a GPU, else on a CPU. sharded, padded: as in `Sizes`.
    """
    at = Sizes(cfg, cfg.model.max_seq_len, gpu, sharded, padded)
    model, layers = cfg.model, cfg.model.n_layers
    kind = cfg.trainer.activation_checkpointing
    recomputed = kind != "none"
    states = 4 * at.tokens * model.d_model
    if recomputed:
        blocks = [states + kept_outputs(at, i) for i in range(layers)]
    else:
        blocks = [_block(at, parameters, i) for i in range(layers)]
    rest = at.norm(model.d_model) + _loss(at, parameters[0].numel)
    rest += 0 if recomputed else _rotary(at) + _ranges(at, range(layers))
    for depth in range(1, predictors(cfg) + 1):
        shorter = replace(at, length=at.length - depth)
        embedded = 4 * shorter.tokens * model.d_model
        if depth > 1 and at.half and not recomputed:
            states = embedded  # The norm copies the part of the states that it reads.
        # The states of the depth before, and the embeddings of later tokens.
        inputs = states + embedded
        states = shorter.input(model.d_model)
        layer = layers + depth - 1
        if recomputed:
            inner = kept_outputs(shorter, layer)
        else:
            inner = _predictor(shorter, parameters, layer)
            rest += _ranges(shorter, [layer])
        blocks.append(inputs + inner)
        rest += _loss(shorter, parameters[0].numel, at.product) + 4
    return Saved(blocks, rest)


def block_bytes(
    cfg: Config,
    parameters: list[Parameter],
    *,
    gpu: bool = False,
    sharded: bool = False,
    padded: bool = False,
) -> int:
    """Return what checkpointing recomputes at a time: of the block that it recomputes most of."""
    at = Sizes(cfg, cfg.model.max_seq_len, gpu, sharded, padded)
    layers = range(cfg.model.n_layers)
    return max(_block(at, parameters, layer) - kept_outputs(at, layer) for layer in layers)


def _block(at: Sizes, parameters: list[Parameter], layer: int) -> int:
    model = at.cfg.model
    name = f"blocks.{layer}." if layer < model.n_layers else f"predictors.{layer - model.n_layers}."
    own = [p for p in parameters if p.name.startswith(name) and ".project." not in p.name]
    copied = sum(p.numel for p in own if p.kind in (Kind.MATRIX, Kind.EXPERT))
    attention = _mla if isinstance(at.cfg.attention, MLAConfig) else _gqa
    # Its input: after a norm, or the residual stream itself.
    first = at.norm(model.d_model) if model.norm == "pre" else 0
    total = first + at.input(model.d_model) + attention(at, layer)
    total += at.norm(model.d_model) + at.weights(copied)
    if routes(at.cfg, layer):
        return total + _experts(at)
    return total + at.input(model.d_model) + _feed_forward(at, at.tokens, dense_width(at.cfg))


def _feed_forward(at: Sizes, rows: int, hidden: int) -> int:
    """Return what lies between a feed-forward's two products, and the input of the second."""
    gated = GATED[at.cfg.model.activation]
    # With a gate: both columns, the activated gate, and their product; else ReLU and its square.
    width = first_columns(gated, hidden) + 2 * hidden if gated else 2 * hidden
    return rows * at.product * width


def _experts(at: Sizes) -> int:
    moe, d_model = at.cfg.moe, at.cfg.model.d_model
    assert isinstance(moe, MoEConfig)
    k, n_experts, tokens = moe.n_experts_per_token, moe.n_experts, at.tokens
    rows = tokens * k
    # Two orders of the dispatch and the choice, int64; the input in float32, for the router.
    total = 3 * 8 * rows + 4 * tokens * d_model
    inside = rows
    if not at.padded:
        total += 8 * (n_experts + 1)  # The counts of rows, int64.
    else:
        blocks, local = expert_blocks(at.cfg, at.length), local_experts(at.cfg)
        inside = blocks.total(local)
        # The place of each row, the row in each place and in none, and the owners of blocks, int64.
        total += 8 * (rows + inside + 1 + blocks.extra)
    total += at.product * (inside + rows) * d_model
    total += _feed_forward(at, inside, expert_width(at.cfg)) + _router(at, n_experts, k)
    if moe.n_shared_experts:
        width = moe.n_shared_experts * expert_width(at.cfg)
        total += at.cast(d_model) + _feed_forward(at, tokens, width)
    return total


def _router(at: Sizes, n_experts: int, k: int) -> int:
    moe = at.cfg.moe
    assert isinstance(moe, MoEConfig)
    sigmoid = moe.router if isinstance(moe.router, SigmoidRouterConfig) else None
    # Probabilities, gates, and for the z-loss (with any weight) logits and their normaliser.
    floats = 2 * n_experts + k + 1
    if moe.normalize_gates:
        floats += k + (1 if sigmoid else 2)
    in_loss = moe.balancing == "aux_loss" and moe.aux_loss_weight > 0
    sequence_losses = int(in_loss and moe.balance_scope == "sequence")
    if sigmoid:
        floats += 1  # The sum of a token's scores.
        sequence_losses += int(sigmoid.sequence_loss_weight > 0)
    shares = at.cfg.trainer.batch_size * n_experts * sequence_losses
    return 4 * (at.tokens * floats + shares)


def _gqa(at: Sizes, layer: int) -> int:
    model, keys = at.cfg.model, at.cfg.attention
    assert isinstance(keys, GQAConfig)
    heads, groups = model.n_heads, model.n_kv_heads
    width = model.d_model // heads
    of_keys = groups * width
    per_head = model.norm == "pre"
    total = at.norm(width, heads, cast=True) if per_head else at.norm(model.d_model, cast=True)
    total += at.norm(width, groups, cast=True) if per_head else at.norm(of_keys, cast=True)
    ranged = has_ranges(at, layer)
    copied = _copies_keys(at, ranged, ranged and keys.ranges == "masked")
    key_heads = heads if copied else groups
    total += _attend(at, heads, key_heads, width, width, keys, ranged)
    projection = at.tokens * at.product * (model.d_model + 2 * of_keys)
    if not copied and not keys.sinks:
        # Values are a view of the whole projection.
        total += projection - at.input(of_keys)
    elif not at.half:
        total += projection
    return total + _gate(at, heads, keys.output_gate)


def _mla(at: Sizes, layer: int) -> int:
    model, keys, widths = at.cfg.model, at.cfg.attention, mla_widths(at.cfg)
    assert isinstance(keys, MLAConfig)
    heads, head = model.n_heads, widths.nope + widths.rope
    total = at.cast(model.d_model)  # Queries and latents each read the layer's input.
    if keys.q_lora_rank:
        total += at.norm(keys.q_lora_rank, cast=True) + at.input(keys.q_lora_rank)
        total += 0 if at.half else 4 * at.tokens * keys.q_lora_rank
    # The norm reads the latent, a part of the projection, which is kept whole in float32.
    total += at.norm(widths.latent, cast=True)
    total += 0 if at.half else 4 * at.tokens * (widths.latent + widths.rope)
    # The normalised latent and the rotated key, of which the product reads the first part.
    total += at.tokens * at.product * (widths.latent + widths.rope)
    total += _attend(at, heads, heads, head, widths.value, keys, has_ranges(at, layer))
    return total + _gate(at, heads, keys.output_gate)


def _attend(
    at: Sizes,
    heads: int,
    key_heads: int,
    width: int,
    value: int,
    keys: GQAConfig | MLAConfig,
    ranged: bool,
) -> int:
    """Return what the attention kernel keeps: queries, keys, values, output and normalisers.

    key_heads: the heads of the keys and values that it reads.
    """
    sequences = at.sequences
    n_queries, n_keys, wide = attention_shape(at, max(width, value), keys.sinks, ranged)
    total = 2 * at.product * sequences * wide * (heads * n_queries + key_heads * n_keys)
    total += 4 * sequences * heads * n_queries
    if keys.output_gate or keys.sinks or width != value:
        total += at.input(heads * value)  # The input of the output projection.
    if ranged and keys.ranges == "masked":
        masks = sequences if at.cfg.data.document_masking else 1
        total += at.product * n_queries * n_keys * masks
    return total


def _gate(at: Sizes, heads: int, gated: bool) -> int:
    """Return what an output gate keeps: a copy of its input, and its sigmoid."""
    return at.cast(at.cfg.model.d_model) + at.input(heads) if gated else 0


def _copies_keys(at: Sizes, ranged: bool, masked: bool) -> bool:
    model = at.cfg.model
    if at.gpu:
        in_kernel = not masked if ranged else at.half
    else:
        in_kernel = not at.half and not model.dropout
    return model.n_kv_heads < model.n_heads and not in_kernel


def _ranges(at: Sizes, layers: Iterable[int]) -> int:
    """Return the tables of the first attended positions, int64, which equal layers share."""
    keys = at.cfg.attention
    if keys.ranges == "masked":  # type: ignore[attr-defined]
        return 0
    kinds = {window_of(keys, layer) for layer in layers if has_ranges(at, layer)}
    return 8 * len(kinds) * at.length * (at.sequences if at.cfg.data.document_masking else 1)


def _rotary(at: Sizes) -> int:
    """Return the tables of cosines and sines, which all layers share."""
    model = at.cfg.model
    head = model.d_model // model.n_heads
    width = mla_widths(at.cfg).rope if isinstance(at.cfg.attention, MLAConfig) else head
    return 4 * model.max_seq_len * width


def _loss(at: Sizes, weight: int, size: int = 4) -> int:
    """Return the gradients that the vocabulary loss computes in its forward.

    size: bytes of a number of its input. A depth of multi-token prediction has the products' dtype.
    """
    return size * at.tokens * at.cfg.model.d_model + 4 * weight + 4


def _predictor(at: Sizes, parameters: list[Parameter], layer: int) -> int:
    """Return what a depth keeps besides its two inputs."""
    d_model = at.cfg.model.d_model
    normalised = 2 * (at.norm(d_model) - 4 * at.tokens * d_model)
    copied = at.weights(2 * d_model * d_model)
    block = _block(at, parameters, layer)
    return normalised + at.input(2 * d_model) + copied + block + at.norm(d_model)
