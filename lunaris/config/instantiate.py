"""Builds what a config names by `_target_`: the only module that instantiates. No torch."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lunaris.config.schema.base import Component, component_keys
from lunaris.errors import UserError, did_you_mean


def instantiate_component(key: str, component: Component, **inputs: Any) -> Any:
    """Return what the class of the component under the dotted `key` makes of its keys and `inputs`.

    Raises UserError when the class cannot be imported or does not take these arguments.
    """
    made = locate_class(key, component)
    return call_component(key, component, made, arguments_of(key, component, made) | inputs)


def arguments_of(
    key: str, component: Component, made: Any, aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the keys of a component as arguments for its class or function `made`.

    A key that has the default of the chosen option is left out where a custom class does not take
    it, or takes another type under its name. aliases: other names of keys, for a class that takes
    one only under that name.
    """
    from hydra.utils import instantiate

    found = {
        name: instantiate_component(f"{key}.{name}", value)
        if isinstance(value, Component)
        else instantiate(value, _convert_="all")
        if isinstance(value, dict | list)
        else value
        for name, value in component_keys(component).items()
    }
    taken = parameters_of(made)
    if taken is None or component._target_.startswith("lunaris."):
        return found
    for name, alias in (aliases or {}).items():
        if name in found and name not in taken and alias in taken:
            found[alias] = found.pop(name)
    unset = {item.name for item in fields(component) if found.get(item.name) == item.default}
    return {
        name: value
        for name, value in found.items()
        if name not in unset or (name in taken and _alike(value, taken[name]))
    }


def _alike(value: Any, default: Any) -> bool:
    """Return whether a value may stand for a parameter with this default, or with none."""
    unknown = default is inspect.Parameter.empty or default is None or value is None
    numbers = isinstance(value, int | float) and isinstance(default, int | float)
    return unknown or numbers or isinstance(value, type(default))


def parameters_of(made: Any) -> dict[str, Any] | None:
    """Return the parameters of a class or function with their defaults; None where it takes any."""
    try:
        found = inspect.signature(made).parameters.values()
    except ValueError:
        return None  # One written in C has no signature.
    if any(each.kind is each.VAR_KEYWORD for each in found):
        return None
    return {each.name: each.default for each in found}


def call_component(key: str, component: Component, made: Any, arguments: dict[str, Any]) -> Any:
    """Return what `made` returns. Raises UserError when it does not take these arguments."""
    check_arguments(key, component, made, arguments)
    return made(**arguments)


def check_arguments(key: str, component: Component, made: Any, arguments: dict[str, Any]) -> None:
    """Raise UserError when the class or function of a component does not take these arguments."""
    try:
        inspect.signature(made).bind(**arguments)
    except ValueError:
        pass  # One written in C has no signature.
    except TypeError as error:
        said = f"{key}._target_={component._target_}"
        raise UserError(f"{said}: its keys do not fit: {error}") from error


def locate_class(key: str, component: Component) -> Any:
    """Return the class, or function, of a component. Raises UserError where there is none."""
    made = locate(f"{key}._target_", component._target_)
    if not callable(made):
        raise UserError(f"{key}._target_={component._target_}: not a class")
    return made


def locate(key: str, dotted: str) -> Any:
    """Return the object at a dotted path. Raises UserError, naming `key`, where there is none."""
    said = f"{key}={dotted}"
    module, *names = str(dotted).split(".")
    try:
        found = _import_first(module)
        for name in names:
            module = f"{module}.{name}"
            # A class may be within a class, and a module not yet imported by its package.
            if not hasattr(found, name):
                _import_part(said, module, found)
            found = getattr(found, name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name != module:
            raise UserError(f"{said}: cannot be imported: {error}") from error
        raise UserError(f"{said}: no such module on the Python path or in this folder") from error
    except Exception as error:  # noqa: BLE001 - the code of a custom module runs here
        raise UserError(f"{said}: cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _import_first(module: str) -> Any:
    """Import a module, also from the current folder, as `python -m lunaris` would.

    The folder comes on the path only for a module that is not installed, which a config that may
    name it has named, and comes last.
    """
    here = os.getcwd()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        there = any(Path(here, module).with_suffix(suffix).exists() for suffix in ("", ".py"))
        if error.name != module or sys.flags.safe_path or {"", here} & set(sys.path) or not there:
            raise
    sys.path.append(here)
    return importlib.import_module(module)


def _import_part(said: str, module: str, parent: Any) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.rpartition(".")[0]):
            raise
        name = module.rpartition(".")[2]
        near = did_you_mean(name, [known for known in vars(parent) if not known.startswith("_")])
        raise UserError(f"{said}: {parent.__name__} has no {name}{near}") from error
