"""Builds the optimizer of a run, by a factory or by a class that is called as torch's own are."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lunaris.config.instantiate import (
    arguments_of,
    call_component,
    locate_class,
    parameters_of,
)
from lunaris.config.schema.optimizer import OptimizerConfig
from lunaris.errors import UserError
from lunaris.optim.groups import by_layout, parameter_groups

_ALIASES = {"learning_rate": "lr"}
# Of torch: their updates do not grow with the gradient, as the rates of mup assume.
_LIKE_ADAM = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam")


def build_optimizer(
    component: OptimizerConfig,
    model: nn.Module,
    *,
    router_lr_scale: float,
    width_multiplier: float = 1.0,
) -> torch.optim.Optimizer:
    """Return the optimizer that a config names, over the parameters of `model`.

    A factory takes `model`, and, if it likes, `router_lr_scale` and `width_multiplier`
    (`WidthFactors.width`), which must otherwise be 1. A class that takes `params` instead gets the
    groups of `parameter_groups`: norms do not decay, routers learn at `router_lr_scale` times the
    rate, and the rates follow the width as Adam's do. `learning_rate` is passed as `lr` where that
    is the parameter's name, and a group's `peak_lr` is its `lr` where the factory sets none. Raises
    UserError for a class that is called otherwise or refuses a value.
    """
    made = locate_class("optimizer", component)
    taken = parameters_of(made) or {"model": None, "router_lr_scale": None}
    arguments = arguments_of("optimizer", component, made, _ALIASES)
    said = f"optimizer._target_={component._target_}"
    if "model" in taken:
        inputs: dict[str, Any] = {
            "model": model,
            "router_lr_scale": router_lr_scale,
            "width_multiplier": width_multiplier,
        }
        if "width_multiplier" not in taken:
            _require_standard(width_multiplier, f"{component._target_} does not take it")
        if "router_lr_scale" not in taken and router_lr_scale != 1:
            raise UserError(
                f"moe.router_lr_scale={router_lr_scale}: {component._target_} does not take "
                "`router_lr_scale`, so it must be 1"
            )
        arguments |= {name: value for name, value in inputs.items() if name in taken}
    elif "params" in taken:
        rate = arguments.get("lr", arguments.get("learning_rate", taken.get("lr")))
        if not isinstance(rate, int | float):
            raise UserError(f"{said}: needs a learning rate, `optimizer.learning_rate` or `.lr`")
        module, _, name = component._target_.rpartition(".")
        if module.startswith("torch.optim") and name not in _LIKE_ADAM:
            rule = f"mup has no rule for {component._target_}, only for {', '.join(_LIKE_ADAM)}"
            _require_standard(width_multiplier, rule)
        decay = arguments.get("weight_decay")
        arguments["params"] = _groups(model, rate, decay, router_lr_scale, width_multiplier)
    else:
        raise UserError(f"{said}: takes neither `model` nor `params`; it takes {', '.join(taken)}")
    try:
        optimizer = call_component("optimizer", component, made, arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError) or component._target_.startswith("lunaris."):
            raise
        raise UserError(f"{said}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{said}: made a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"{said}: its step needs a closure, which training does not give")
    for group in optimizer.param_groups:
        if "peak_lr" not in group:
            group["peak_lr"] = group["lr"]
    return optimizer


def _require_standard(width_multiplier: float, reason: str) -> None:
    """Raise UserError where the rates follow the width and an optimizer cannot follow."""
    if width_multiplier != 1:
        raise UserError(
            f"model.parametrization=mup: the optimizer needs width_multiplier={width_multiplier:g} "
            f"(model.d_model / model.mup_base_width), and {reason}; choose optimizer=adamw or muon"
        )


def _groups(
    model: nn.Module,
    rate: float,
    decay: float | None,
    router_lr_scale: float,
    width_multiplier: float,
) -> list[dict[str, Any]]:
    """Return parameter groups; decay: None leaves it to the class."""
    groups = []
    rates = (rate, decay or 0.0, router_lr_scale, width_multiplier)
    for group in parameter_groups(model, *rates).values():
        if decay is None:
            del group["weight_decay"]
        groups += [group | {"params": params} for params in by_layout(group["params"])]
    return groups
