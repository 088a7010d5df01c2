"""Classes that a config names by `_target_`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, cast

from lunaris.errors import UserError


def group_keys(group: Any) -> dict[str, Any]:
    """Return the keys of a config group that its class takes: all but `_target_`."""
    if is_dataclass(group):
        keys = vars(group)
    else:
        from omegaconf import OmegaConf

        keys = cast("dict[str, Any]", OmegaConf.to_container(group, resolve=True))
    return {key: value for key, value in keys.items() if key != "_target_"}


def build(key: str, dotted: str, keys: dict[str, Any]) -> Any:
    """Return what the class that a `_target_`, given as `key`, names makes of its keys.

    Raises UserError when there is no such class or it does not take them.
    """
    made = _load(key, dotted)
    check_fit(f"{key}={dotted}", made, (), keys)
    return made(**keys)


def check_fit(said: str, made: Callable[..., Any], args: tuple[Any, ...], keys: Any) -> None:
    """Raise UserError unless a class or function takes these arguments."""
    if not callable(made):
        raise UserError(f"{said}: not a class")
    try:
        signature = inspect.signature(made)
    except ValueError:  # One written in C tells none.
        return
    try:
        signature.bind(*args, **keys)
    except TypeError as error:
        raise UserError(f"{said}: its keys do not fit: {error}") from error


def _load(key: str, dotted: str) -> Any:
    module, *names = dotted.split(".")
    try:
        found = importlib.import_module(module)
        for name in names:
            module = f"{module}.{name}"
            # A class may be within a class, and a module not yet imported by its package.
            found = (
                getattr(found, name) if hasattr(found, name) else importlib.import_module(module)
            )
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={dotted}: cannot be imported: {error}") from error
    return found
