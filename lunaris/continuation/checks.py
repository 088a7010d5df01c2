"""What a run is checked for before it is launched. No torch where there is nothing to check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.config.schema.base import Component
from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.config.validate import data_comes_later, is_custom
from lunaris.errors import UserError
from lunaris.runs.facts import checkpoint_folders, is_complete
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    import torch

    from lunaris.model.transformer import Transformer

# For the sizes of a model that is built only to be looked at.
_ANY_VOCABULARY = 256


def check_start(cfg: Config) -> None:
    """Raise UserError where a run cannot start; write nothing.

    That is where custom classes cannot be called or lack what training needs of them, or the
    weights that a new run starts from do not fit.
    """
    _check_keys(cfg)
    _check_parts(cfg)
    _check_weights(cfg)


def _check_keys(cfg: Config) -> None:
    """Raise UserError where a custom class, which is built only later, does not take its keys."""
    from lunaris.config.instantiate import arguments_of, check_arguments, locate_class

    later: dict[str, Component] = {
        "data": cfg.data, "parallelism": cfg.parallelism, "launch": cfg.launch,
        **{f"logger.{name}": logger for name, logger in cfg.logger.items()},
    }  # fmt: skip
    for key, part in later.items():
        if is_custom(part):
            made = locate_class(key, part)
            check_arguments(key, part, made, arguments_of(key, part, made))


def _check_parts(cfg: Config) -> None:
    """Build the model without memory where some parts are custom, and look at them."""
    router = getattr(cfg.moe, "router", None)
    parts: dict[str, Component] = {
        "attention": cfg.attention, "moe": cfg.moe, "objective": cfg.objective,
        "optimizer": cfg.optimizer, "schedule": cfg.schedule,
    }  # fmt: skip
    if isinstance(router, Component):
        parts["moe.router"] = router
    custom = {key: part._target_ for key, part in parts.items() if is_custom(part)}
    if not custom:
        return
    from lunaris.config.instantiate import instantiate_component
    from lunaris.model.roles import parameter_roles
    from lunaris.optim.build import build_optimizer
    from lunaris.run import bare_model

    objective = instantiate_component("objective", cfg.objective)
    model = bare_model(cfg, cfg.model.vocab_size or _ANY_VOCABULARY)
    for key, target in custom.items():
        if key == "optimizer":
            width = cfg.model.width_factors().width
            optimizer = build_optimizer(
                cfg.optimizer, model, router_lr_scale=1.0, width_multiplier=width
            )
            _try_step(target, optimizer)
        elif key == "schedule":
            instantiate_component(key, cfg.schedule, max_steps=cfg.trainer.max_steps)
        else:
            made = [objective] if key == "objective" else _parts_of(model, key)
            _check_methods(key, target, made)
    parameter_roles(model)


def _try_step(target: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where an optimizer refuses a step with gradients as training makes them."""
    import torch

    keys = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    try:
        small = type(optimizer)([keys | {"params": [weight]}])  # type: ignore[call-arg]
    except TypeError:
        return  # Its constructor needs more than its groups hold.
    try:
        small.step()
    except Exception as error:  # noqa: BLE001 - the code of a custom class runs here
        said = f"optimizer._target_={target}: cannot make a step"
        raise UserError(f"{said}: {type(error).__name__}: {error}") from error


def _parts_of(model: Transformer, key: str) -> list[Any]:
    """Return the modules of a model that the component under `key` made."""
    if key == "attention":
        return [block.attention for block in model.blocks]
    found = [block.feed_forward for block in model.blocks]
    if key == "moe.router":
        # A layer may be dense, and custom experts may hold their router elsewhere.
        found = [each.router for each in found if hasattr(each, "router")]
    return found


def _check_methods(key: str, target: str, made: list[Any]) -> None:
    """Raise UserError for the first method that what a custom class made lacks."""
    from torch import nn

    from lunaris.model.attention.base import Attention
    from lunaris.moe.router.base import Router
    from lunaris.objective.base import Objective

    # The base of each, and its methods that have to be defined.
    base, names = {
        "attention": (Attention, ("forward", "new_cache", "flops_per_token")),
        "moe": (nn.Module, ("forward",)),
        "moe.router": (Router, ("forward",)),
        "objective": (Objective, ("__call__", "count_targets")),
    }[key]
    further = {"attention": ("prepare",), "moe.router": ("update_balance",)}.get(key, ())
    for part in made:
        kind = type(part)
        said = f"{key}._target_={target}: {kind.__name__}"
        if key != "objective" and not isinstance(part, nn.Module):
            raise UserError(f"{said} is not a torch.nn.Module")
        lacking = [
            name for name in (*names, *further)
            if not hasattr(kind, name)
            or (name in names and getattr(kind, name) is getattr(base, name, None))
        ]  # fmt: skip
        if lacking:
            raise UserError(
                f"{said} has no method {lacking[0]}; {base.__module__}.{base.__name__} says what "
                "it takes and returns"
            )


def _come_later(cfg: Config) -> bool:
    """Return whether the weights of `init_from` are still to be made by a run that is awaited.

    The job then checks whether they fit.
    """
    launch, given = cfg.launch, Path(str(cfg.init_from)).resolve()
    if not isinstance(launch, SlurmLaunchConfig):
        return False
    awaited = [Path(folder).resolve() for folder in launch.awaited()]
    if not any(folder in (given, *given.parents) for folder in awaited):
        return False
    saved = checkpoint_folders(RunDir(given).checkpoints)
    return not given.is_file() and not any(map(is_complete, [given, *saved]))


def _check_weights(cfg: Config) -> None:
    begun = checkpoint_folders(RunDir(cfg.out_dir).checkpoints)
    later = _come_later(cfg) or data_comes_later(cfg)
    if cfg.init_from is not None and not begun and not later:
        from lunaris.config.instantiate import instantiate_component
        from lunaris.data.prepare.build import make_ready
        from lunaris.run import bare_model
        from lunaris.warm_start.begin import plan_start, shapes_of
        from lunaris.warm_start.source import find

        data = instantiate_component("data", cfg.data)
        make_ready(data)
        shapes = shapes_of(bare_model(cfg, data.vocab_size).state_dict())
        plan_start(cfg, find(str(cfg.init_from)), shapes, data)
