"""Classes that a config names by `_target_`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lunaris.errors import UserError


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
