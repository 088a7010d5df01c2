"""Which architecture a config exports to. No torch."""

from __future__ import annotations

from lunaris.config.schema.attention import SlidingWindowConfig
from lunaris.config.schema.moe import MoEConfig, SigmoidRouterConfig
from lunaris.errors import UserError
from lunaris.export.deepseek import deepseek_v2, deepseek_v3
from lunaris.export.dots1 import dots1
from lunaris.export.family import Family
from lunaris.export.qwen3 import qwen3, qwen3_moe
from lunaris.export.settings import Settings, check_exportable


def choose(settings: Settings) -> Family:
    """Return the family that computes what a run's model does.

    Raises UserError, naming the key and what to change, where there is none.
    """
    check_exportable(settings.cfg)
    _refuse_norm(settings)
    if settings.sigmoid:
        _refuse_groups(settings.sigmoid, settings)
        return deepseek_v3(settings) if settings.mla else dots1(settings)
    if settings.moe is None:
        return deepseek_v3(settings) if settings.mla else qwen3(settings)
    _refuse_bias(settings.moe)
    if settings.mla:
        _refuse_normalized(settings.moe)
        return deepseek_v2(settings)
    _refuse_softmax(settings.moe, settings)
    return qwen3_moe(settings)


def _refuse_norm(settings: Settings) -> None:
    if settings.cfg.model.norm != "pre":
        raise UserError(
            f"model.norm={settings.cfg.model.norm}: no class of transformers has this placement of "
            "norms; train with model.norm=pre to export"
        )


def _refuse_groups(router: SigmoidRouterConfig, settings: Settings) -> None:
    """Refuse groups whose two best experts the exported classes cannot add up."""
    assert settings.moe is not None
    n_groups = router.n_groups if router.topk_groups < router.n_groups else 1
    if settings.moe.n_experts < 2 * n_groups:
        raise UserError(
            f"moe.router.n_groups={router.n_groups}: the class of sigmoid-routed experts needs two "
            f"experts in a group; moe.n_experts={settings.moe.n_experts} gives fewer"
        )


def _refuse_bias(moe: MoEConfig) -> None:
    if moe.balancing == "bias":
        raise UserError(
            "moe.balancing=bias: no class of transformers has a bias in a softmax router's choice; "
            "train with moe/router=sigmoid, or moe.balancing=aux_loss, to export"
        )


def _refuse_normalized(moe: MoEConfig) -> None:
    if moe.normalize_gates:
        raise UserError(
            "moe.normalize_gates=true: the class of latent attention with a softmax router has raw "
            "gates; train with moe.normalize_gates=false, or moe/router=sigmoid, to export"
        )


def _refuse_softmax(moe: MoEConfig, settings: Settings) -> None:
    """Refuse what Qwen3-MoE does not compute."""
    if moe.n_shared_experts:
        raise UserError(
            f"moe.n_shared_experts={moe.n_shared_experts}: the class of softmax-routed experts has "
            "no shared ones; train with moe/router=sigmoid, or moe.n_shared_experts=0, to export"
        )
    attention = settings.cfg.attention
    if isinstance(attention, SlidingWindowConfig) and len(set(settings.windows)) > 1:
        raise UserError(
            f"attention.full_every={attention.full_every}: the class of softmax-routed experts has "
            "one window for all layers; train with attention.full_every=null, or "
            "moe/router=sigmoid, to export"
        )
