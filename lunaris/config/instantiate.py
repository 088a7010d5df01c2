"""Builds what a config names by `_target_`: the only module that instantiates. No torch."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from lunaris.config.schema.base import Component, component_keys
from lunaris.errors import UserError, did_you_mean


def instantiate_component(key: str, component: Component, **inputs: Any) -> Any:
    """Return what the class of the component under the dotted `key` makes of its keys and `inputs`.

    Raises UserError when the class cannot be imported or does not take these arguments.
    """
    from hydra.utils import instantiate

    made = locate_class(key, component)
    keys = {
        name: instantiate_component(f"{key}.{name}", value)
        if isinstance(value, Component)
        else instantiate(value, _convert_="all")
        if isinstance(value, dict | list)
        else value
        for name, value in component_keys(component).items()
    }
    try:
        inspect.signature(made).bind(**keys, **inputs)
    except ValueError:
        pass  # One written in C has no signature.
    except TypeError as error:
        said = f"{key}._target_={component._target_}"
        raise UserError(f"{said}: its keys do not fit: {error}") from error
    return made(**keys, **inputs)


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
        found = importlib.import_module(module)
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
        raise UserError(f"{said}: no such module on the Python path") from error
    except Exception as error:  # noqa: BLE001 - the code of a custom module runs here
        raise UserError(f"{said}: cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _import_part(said: str, module: str, parent: Any) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.rpartition(".")[0]):
            raise
        name = module.rpartition(".")[2]
        near = did_you_mean(name, [known for known in vars(parent) if not known.startswith("_")])
        raise UserError(f"{said}: {parent.__name__} has no {name}{near}") from error
