"""The parameters that a config's model has: names, shapes and roles, as the model itself builds.

`tests/planning/test_parameters.py` compares them with the model of every option. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from lunaris.config.schema.attention import (
    AttentionConfig,
    GQAConfig,
    MLAConfig,
    SlidingWindowConfig,
)
from lunaris.config.schema.base import Component
from lunaris.config.schema.moe import MoEConfig
from lunaris.config.schema.objective import MultiTokenConfig
from lunaris.config.schema.root import Config
from lunaris.config.widths import GATED, LatentWidths, first_columns, hidden_width, latent_widths
from lunaris.errors import UserError


class Kind(StrEnum):
    """What a parameter is for: the roles of `lunaris.model.roles`."""

    MATRIX = "matrix"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    ROUTER = "router"
    NORM = "norm"
    BIAS = "bias"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, with its name there. part: what a plan lists it under."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    part: str

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def unit(self) -> str:
        """The module that is sharded as a whole: a block, a predictor, or "" for the rest."""
        first, _, rest = self.name.partition(".")
        return f"{first}.{rest.partition('.')[0]}" if first in ("blocks", "predictors") else ""


def require_known(cfg: Config) -> None:
    """Raise UserError for a custom class, whose parameters are not known without torch."""
    parts: dict[str, object] = {"attention": cfg.attention, "moe": cfg.moe}
    parts |= {"objective": cfg.objective, "optimizer": cfg.optimizer}
    parts["parallelism"] = cfg.parallelism
    if isinstance(cfg.moe, MoEConfig):
        parts["moe.router"] = cfg.moe.router
    for key, part in parts.items():
        if isinstance(part, Component) and not part._target_.startswith("lunaris."):
            raise UserError(
                f"{key}._target_={part._target_}: a custom class; the plan counts the package's "
                "own parts only"
            )


def model_parameters(cfg: Config, vocab_size: int) -> list[Parameter]:
    """Return the parameters of a config's model, in the model's order.

    Raises UserError for a custom class.
    """
    require_known(cfg)
    model = cfg.model
    found = [_embedding("embedding.weight", vocab_size, model.d_model)]
    for layer in range(model.n_layers):
        found += _block(cfg, layer, f"blocks.{layer}")
    found.append(_norm("norm.weight", model.d_model))
    for depth in range(predictors(cfg)):
        found += _predictor(cfg, depth)
    if not model.tie_embeddings:
        found.append(_embedding("head.weight", vocab_size, model.d_model))
    return found


def predictors(cfg: Config) -> int:
    """Return the number of further depths that the objective trains."""
    return cfg.objective.depth if isinstance(cfg.objective, MultiTokenConfig) else 0


def routes(cfg: Config, layer: int) -> bool:
    """Return whether a layer has experts; predictors count on after the last layer."""
    return isinstance(cfg.moe, MoEConfig) and layer >= cfg.moe.first_dense_layers


def expert_width(cfg: Config) -> int:
    """Return the hidden width of one expert."""
    assert isinstance(cfg.moe, MoEConfig)
    return cfg.moe.expert_width(cfg.model)


def dense_width(cfg: Config) -> int:
    """Return the hidden width of a dense feed-forward."""
    return _hidden(cfg, cfg.model.ffn_hidden_multiplier)


def mla_widths(cfg: Config) -> LatentWidths:
    """Return the widths of latent attention."""
    keys = cfg.attention
    assert isinstance(keys, MLAConfig)
    return latent_widths(
        cfg.model.d_model // cfg.model.n_heads,
        latent=keys.kv_lora_rank,
        nope=keys.qk_nope_head_dim,
        rope=keys.qk_rope_head_dim,
        value=keys.v_head_dim,
    )


def active_parameters(cfg: Config, found: list[Parameter]) -> int:
    """Return how many of the parameters one token passes through."""
    total = sum(p.numel for p in found)
    if not isinstance(cfg.moe, MoEConfig):
        return total
    experts = sum(p.numel for p in found if p.kind is Kind.EXPERT)
    return total - experts + experts // cfg.moe.n_experts * cfg.moe.n_experts_per_token


def flops_per_token(cfg: Config, found: list[Parameter]) -> float:
    """Return the FLOPs of forward and backward a token (arXiv 2204.02311, appendix B).

    6 for each parameter that multiplies it, without the embedding's look-up, plus the scores and
    weighted values of attention.
    """
    active = active_parameters(cfg, found)
    embedding = found[0].numel
    if not cfg.model.tie_embeddings:
        active -= embedding
    active += predictors(cfg) * embedding
    layers = range(cfg.model.n_layers + predictors(cfg))
    return 6.0 * active + sum(_attention_flops(cfg, layer) for layer in layers)


def window_of(attention: AttentionConfig, layer: int) -> int | None:
    """Return the window of a layer's attention, or None where it attends to all positions."""
    if not isinstance(attention, SlidingWindowConfig):
        return None
    every = attention.full_every
    return None if every is not None and (layer + 1) % every == 0 else attention.window


def _attention_flops(cfg: Config, layer: int) -> float:
    length, heads = cfg.model.max_seq_len, cfg.model.n_heads
    if isinstance(cfg.attention, MLAConfig):
        widths = mla_widths(cfg)
        return 6.0 * heads * (widths.nope + widths.rope + widths.value) * length
    window = window_of(cfg.attention, layer)
    return 12.0 * cfg.model.d_model * (length if window is None else min(length, window))


def _hidden(cfg: Config, multiplier: float) -> int:
    model = cfg.model
    gated = GATED[model.activation]
    return hidden_width(gated, model.d_model, multiplier, model.multiple_of)


def _block(cfg: Config, layer: int, at: str) -> Iterator[Parameter]:
    d_model = cfg.model.d_model
    if cfg.model.norm == "pre":
        yield _norm(f"{at}.attention_norm.weight", d_model)
    attention = _mla if isinstance(cfg.attention, MLAConfig) else _gqa
    yield from attention(cfg, f"{at}.attention")
    yield _norm(f"{at}.feed_forward_norm.weight", d_model)
    if routes(cfg, layer):
        yield from _experts(cfg, f"{at}.feed_forward")
    else:
        yield from _feed_forward(cfg, f"{at}.feed_forward.swiglu", dense_width(cfg), "dense")


def _gqa(cfg: Config, at: str) -> Iterator[Parameter]:
    model, keys = cfg.model, cfg.attention
    assert isinstance(keys, GQAConfig)
    width = model.d_model // model.n_heads
    of_keys = model.n_kv_heads * width
    # The order of `named_parameters`: a module's own ones come first.
    yield from _gates(cfg, at, keys.sinks, output_gate=False)
    yield _matrix(f"{at}.qkv.weight", model.d_model + 2 * of_keys, model.d_model)
    yield _matrix(f"{at}.out.weight", model.d_model, model.d_model)
    per_head = model.norm == "pre"
    yield _norm(f"{at}.q_norm.weight", width if per_head else model.d_model)
    yield _norm(f"{at}.k_norm.weight", width if per_head else of_keys)
    yield from _gates(cfg, at, False, keys.output_gate)


def _mla(cfg: Config, at: str) -> Iterator[Parameter]:
    model, keys, widths = cfg.model, cfg.attention, mla_widths(cfg)
    assert isinstance(keys, MLAConfig)
    heads, rank = model.n_heads, keys.q_lora_rank
    yield from _gates(cfg, at, keys.sinks, output_gate=False)
    if rank:
        yield _matrix(f"{at}.q_a.weight", rank, model.d_model)
        yield _norm(f"{at}.q_norm.weight", rank)
    yield _matrix(f"{at}.q_b.weight", heads * (widths.nope + widths.rope), rank or model.d_model)
    yield _matrix(f"{at}.kv_a.weight", widths.latent + widths.rope, model.d_model)
    yield _norm(f"{at}.kv_norm.weight", widths.latent)
    yield _matrix(f"{at}.kv_b.weight", heads * (widths.nope + widths.value), widths.latent)
    yield _matrix(f"{at}.out.weight", model.d_model, heads * widths.value)
    yield from _gates(cfg, at, False, keys.output_gate)


def _gates(cfg: Config, at: str, sinks: bool, output_gate: bool) -> Iterator[Parameter]:
    if sinks:
        yield Parameter(f"{at}.sinks", (cfg.model.n_heads,), Kind.BIAS, "attention")
    if output_gate:
        yield _matrix(f"{at}.gate.weight", cfg.model.n_heads, cfg.model.d_model)


def _experts(cfg: Config, at: str) -> Iterator[Parameter]:
    moe, d_model, hidden = cfg.moe, cfg.model.d_model, expert_width(cfg)
    assert isinstance(moe, MoEConfig)
    columns = first_columns(GATED[cfg.model.activation], hidden)
    shapes = {"gate_up": (d_model, columns), "down": (hidden, d_model)}
    yield Parameter(f"{at}.router.weight", (moe.n_experts, d_model), Kind.ROUTER, "router")
    for name, shape in shapes.items():
        full = (moe.n_experts, *shape)
        yield Parameter(f"{at}.experts.{name}", full, Kind.EXPERT, "experts")
    if moe.n_shared_experts:
        width = moe.n_shared_experts * hidden
        yield from _feed_forward(cfg, f"{at}.shared", width, "shared experts")


def _feed_forward(cfg: Config, at: str, hidden: int, part: str) -> Iterator[Parameter]:
    columns = first_columns(GATED[cfg.model.activation], hidden)
    yield _matrix(f"{at}.gate_up.weight", columns, cfg.model.d_model, part)
    yield _matrix(f"{at}.down.weight", cfg.model.d_model, hidden, part)


def _predictor(cfg: Config, depth: int) -> Iterator[Parameter]:
    at, d_model = f"predictors.{depth}", cfg.model.d_model
    yield _norm(f"{at}.hidden_norm.weight", d_model)
    yield _norm(f"{at}.embedding_norm.weight", d_model)
    yield _matrix(f"{at}.project.weight", d_model, 2 * d_model, "multi-token")
    yield from _block(cfg, cfg.model.n_layers + depth, f"{at}.block")
    yield _norm(f"{at}.norm.weight", d_model)


def _matrix(name: str, rows: int, columns: int, part: str = "attention") -> Parameter:
    return Parameter(name, (rows, columns), Kind.MATRIX, part)


def _embedding(name: str, vocab_size: int, d_model: int) -> Parameter:
    return Parameter(name, (vocab_size, d_model), Kind.EMBEDDING, "embeddings")


def _norm(name: str, width: int) -> Parameter:
    return Parameter(name, (width,), Kind.NORM, "norms")
