"""Experts from a dense feed-forward: sparse upcycling (arXiv 2212.05055) and its variants.

Shapes: D model width, H hidden width of an expert, E experts, k chosen for a token, G parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lunaris.config.schema.moe import MoEConfig, SigmoidRouterConfig
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.model.init import STD, copy_to_shard, fill_experts, seeded_normal, width_divisor
from lunaris.model.roles import Role
from lunaris.warm_start.fit import DENSE, EXPERTS, ROUTER, SHARED, Fit, Shapes


@dataclass(frozen=True)
class Recipe:
    """How the experts of every layer are made from the dense feed-forward.

    parts: G; expert e takes part e mod G of the hidden width (virtual groups, arXiv 2410.07524).
    factor: of the down projection. inexact: why the first forward differs from that of the dense
    model, or "". noise: standard deviation of what is added, relative to that of the weights. drop:
    share of each expert's hidden units that are drawn again (Drop-Upcycling, arXiv 2502.19261).
    router_std: standard deviation of a fresh router's weights.
    """

    parts: int
    factor: float
    inexact: str
    noise: float
    drop: float
    seed: int
    router_std: float


def recipe_of(cfg: Config, found: Fit, model: Shapes, source: Shapes) -> Recipe | None:
    """Return how to upcycle, or None where no layer is; raise UserError where it cannot be done."""
    given = f"init_from={cfg.init_from}"
    if not found.upcycled:
        for key in ("init_from_noise", "init_from_drop"):
            if getattr(cfg, key):
                raise UserError(
                    f"{key}={getattr(cfg, key)}: changes experts that come from a dense "
                    f"feed-forward, and {given} starts none"
                )
        return None
    prefix = found.upcycled[0]
    dense = source[f"{prefix}{DENSE}down.weight"][1]
    n_experts, hidden, _ = model[f"{prefix}{EXPERTS}down"]
    columns, rows = model[f"{prefix}{EXPERTS}gate_up"][2], source[f"{prefix}{DENSE}gate_up.weight"]
    if dense % hidden or columns * dense != rows[0] * hidden:
        raise UserError(
            f"{given}: its feed-forward has a hidden width of {dense}, which experts of {hidden} "
            "do not cut into equal parts; set moe.expert_hidden_multiplier "
            f"({cfg.model.ffn_hidden_multiplier:g} copies it whole)"
        )
    if not isinstance(cfg.moe, MoEConfig):
        raise UserError(f"{given}: cannot make experts for moe._target_={cfg.moe._target_}")
    parts, k = dense // hidden, cfg.moe.n_experts_per_token
    groups = getattr(cfg.moe.router, "n_groups", 1)
    if k % parts or n_experts % parts or n_experts // groups % parts:
        raise UserError(
            f"{given}: experts of {hidden} cut its hidden width of {dense} into {parts} parts; "
            f"moe.n_experts={n_experts}, moe.n_experts_per_token={k} and the experts of a group "
            f"must be multiples of {parts}"
        )
    factor, inexact = _factor(cfg.moe, parts)
    if cfg.init_from_noise:
        inexact = f"init_from_noise={cfg.init_from_noise} changes the experts"
    if cfg.init_from_drop:
        inexact = f"init_from_drop={cfg.init_from_drop} draws a part of the experts again"
    router_std = STD / width_divisor(Role.ROUTER, cfg.model.width_factors().width)
    return Recipe(
        parts, factor, inexact, cfg.init_from_noise, cfg.init_from_drop, cfg.seed, router_std
    )


def _factor(moe: MoEConfig, parts: int) -> tuple[float, str]:
    """Return the factor of the down projection, and why the gates do not sum to what it assumes.

    The k chosen experts are whole groups of G, whose gates are equal. So with gates that sum to s,
    the output is that of the dense feed-forward times s / G.
    """
    k, router = moe.n_experts_per_token, moe.router
    sigmoid = isinstance(router, SigmoidRouterConfig)
    scale = router.route_scale if isinstance(router, SigmoidRouterConfig) else 1.0
    if moe.normalize_gates:
        return parts / scale, ""
    # A fresh router's logits are near 0: a sigmoid near 1/2, a softmax near 1/E.
    expected = scale * k * (0.5 if sigmoid else 1 / moe.n_experts)
    return parts / expected, (
        f"the gates of moe.normalize_gates=false do not sum to a constant, only to about "
        f"{expected:.3g}, for which the experts are scaled"
    )


@torch.no_grad()
def fill_layer(
    prefix: str, targets: dict[str, Tensor], dense: dict[str, Tensor], recipe: Recipe
) -> None:
    """Fill this process's shards of one layer's experts, router and shared experts, in place.

    targets: the tensors of the model by name. dense: `gate_up` [2H′, D] (or [H′, D] without a gate)
    and `down` [D, H′] of the dense feed-forward, float32 on the CPU.
    """
    name = f"{prefix}{EXPERTS}"
    down, up = targets[f"{name}down"], targets[f"{name}gate_up"]
    hidden = down.size(1)
    pieces = dense["gate_up"].unflatten(0, (-1, dense["down"].size(1)))  # [2 or 1, H′, D]

    def part_of(expert: int) -> slice:
        first = expert % recipe.parts * hidden
        return slice(first, first + hidden)

    def gate_up_of(expert: int) -> Tensor:
        weight = pieces[:, part_of(expert)].flatten(0, 1).mT  # [D, 2H]
        weight = _perturbed(weight, recipe, f"{name}gate_up[{expert}]")
        drawn = _dropped(hidden, recipe, f"{name}[{expert}]").repeat(pieces.size(0))
        return _drawn_again(weight, drawn, recipe, f"{name}gate_up[{expert}]")

    def down_of(expert: int) -> Tensor:
        weight = dense["down"][:, part_of(expert)]  # [D, H]
        weight = _perturbed(weight, recipe, f"{name}down[{expert}]")
        drawn = _dropped(hidden, recipe, f"{name}[{expert}]")
        return _drawn_again(weight, drawn, recipe, f"{name}down[{expert}]").mT * recipe.factor

    fill_experts(up, gate_up_of)
    fill_experts(down, down_of)
    _fill_router(f"{prefix}{ROUTER}weight", targets, recipe)
    _fill_shared(f"{prefix}{SHARED}", targets, pieces)


def _fill_router(name: str, targets: dict[str, Tensor], recipe: Recipe) -> None:
    """Repeat the fresh rows within each group of experts, so that a group is chosen as one."""
    if recipe.parts > 1 and name in targets:
        fresh = seeded_normal(tuple(targets[name].shape), recipe.router_std, recipe.seed, name)
        group = torch.arange(len(fresh)) // recipe.parts * recipe.parts
        copy_to_shard(targets[name], fresh[group])


def _fill_shared(name: str, targets: dict[str, Tensor], pieces: Tensor) -> None:
    """Give the shared experts the first hidden units; their output starts at 0.

    Units past those of the dense feed-forward stay fresh.
    """
    if f"{name}down.weight" not in targets:
        return
    up, down = targets[f"{name}gate_up.weight"], targets[f"{name}down.weight"]
    width = down.size(1)
    if width <= pieces.size(1):
        copy_to_shard(up, pieces[:, :width].flatten(0, 1))
    copy_to_shard(down, torch.zeros(down.shape))


def _perturbed(weight: Tensor, recipe: Recipe, name: str) -> Tensor:
    if not recipe.noise:
        return weight
    std = recipe.noise * weight.std().item()
    return weight + seeded_normal(tuple(weight.shape), std, recipe.seed, f"{name}.noise")


def _dropped(hidden: int, recipe: Recipe, name: str) -> Tensor:
    """Return which hidden units of an expert are drawn again ([H] bool)."""
    order = seeded_normal((hidden,), 1.0, recipe.seed, f"{name}.dropped").argsort()
    return order < round(recipe.drop * hidden)


def _drawn_again(weight: Tensor, columns: Tensor, recipe: Recipe, name: str) -> Tensor:
    """Return [D, C] with some columns drawn from the normal distribution of the weights."""
    if not recipe.drop:
        return weight
    fresh = seeded_normal(tuple(weight.shape), weight.std().item(), recipe.seed, f"{name}.drawn")
    return torch.where(columns, fresh + weight.mean(), weight)
