"""Which architecture a config exports to. No torch."""

from __future__ import annotations

from lunaris.config.schema.moe import SigmoidRouterConfig
from lunaris.errors import UserError
from lunaris.export.deepseek import deepseek_v2, deepseek_v3
from lunaris.export.dots1 import dots1
from lunaris.export.family import Family
from lunaris.export.own import own_class
from lunaris.export.qwen3 import qwen3, qwen3_moe
from lunaris.export.settings import Settings, check_exportable


def choose(settings: Settings) -> Family:
    """Return the family that computes what a run's model does.

    Raises UserError, naming the key and what to change, where there is none.
    """
    check_exportable(settings.cfg)
    moe = settings.moe
    if settings.sigmoid:
        _refuse_groups(settings.sigmoid, settings)
    if settings.mla:
        return _latent(settings)
    if settings.cfg.model.norm != "pre":
        return own_class(settings)
    if moe is None:
        return qwen3(settings)
    if settings.sigmoid:
        return dots1(settings)
    one_window = len(set(settings.windows)) == 1
    stock = one_window and moe.balancing != "bias" and not moe.n_shared_experts
    return qwen3_moe(settings) if stock else own_class(settings)


def _latent(settings: Settings) -> Family:
    """Return the family of a model with latent attention."""
    moe = settings.moe
    if moe is None or settings.sigmoid:
        return deepseek_v3(settings)
    for wrong, key in (
        (moe.balancing == "bias", "moe.balancing=bias"),
        (moe.normalize_gates, "moe.normalize_gates=true"),
    ):
        if wrong:
            raise UserError(
                f"{key}: the class of latent attention with a softmax router has raw gates and no "
                "bias; train with moe/router=sigmoid, or without this key, to export"
            )
    return deepseek_v2(settings)


def _refuse_groups(router: SigmoidRouterConfig, settings: Settings) -> None:
    """Refuse groups whose two best experts the exported classes cannot add up."""
    assert settings.moe is not None
    n_groups = router.n_groups if router.topk_groups < router.n_groups else 1
    if settings.moe.n_experts < 2 * n_groups:
        raise UserError(
            f"moe.router.n_groups={router.n_groups}: the class of sigmoid-routed experts needs two "
            f"experts in a group; moe.n_experts={settings.moe.n_experts} gives fewer"
        )
