"""From a composed tree to typed objects and back: every group gets its schema. No torch.

A component's schema is found by its `_target_`; a custom class may name its own by `_schema_`, the
dotted path of a dataclass below the group's base. A custom class without one gets a schema that is
inferred from the keys it is given.
"""

from __future__ import annotations

import re
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lunaris.config.instantiate import locate
from lunaris.config.keys import (
    components_of,
    groups,
    is_inferred,
    is_ours,
    options,
    options_of,
    schema_keys,
    schema_of_target,
    takes,
)
from lunaris.config.messages import explain, no_such_key, shown, wrong_value
from lunaris.config.schema.base import Component, component_keys
from lunaris.config.schema.root import Config
from lunaris.errors import UserError, did_you_mean

SCHEMA = "_schema_"
_OURS = "lunaris."


# `Config` for OmegaConf: the key of a component takes any schema, also a custom one. A module's
# attribute, so that it is pickled by name.
OpenConfig = make_dataclass(
    "OpenConfig",
    [
        (key.name, Any, field(default_factory=dict) if key.metadata.get("many") else MISSING)
        for key in components_of(Config)
    ],
    bases=(Config,),
    namespace={"__module__": __name__},
)


def complete_tree(tree: dict[str, Any]) -> DictConfig:
    """Return the tree of a config file, with the default component of every group it lacks.

    Raises UserError for a key of a group of values that does not exist, or for its type.
    """
    for key in components_of(Config):
        default = {"_target_": key.metadata["default"]._target_}
        tree.setdefault(key.name, {"local": default} if key.metadata.get("many") else default)
    _check_keys(tree, Config)
    cfg: Any = OmegaConf.structured(OpenConfig)
    for name, value in tree.items():
        values_only = OmegaConf.get_type(cfg, name) in groups().get(name, ())
        if values_only and not isinstance(value, dict):
            raise UserError(f"{name}={shown(value)}: must be {takes(Config, name)}")
        try:
            cfg[name] = OmegaConf.merge(cfg[name], value) if values_only else value
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from error
    return cfg


def give_schemas(cfg: DictConfig, *, strict: bool = True) -> None:
    """Give each component of a composed tree its schema, and check that all keys are known.

    Raises UserError for an unknown key, a class that does not fit, and a value of a wrong type.
    strict=False: leaves a part with such a fault as it is; an override may yet mend it.
    """
    for key in fields(Config):
        try:
            if key.metadata.get("many"):
                loggers = _chosen(cfg, key.name, key.name, key.name)
                if "_target_" in loggers or SCHEMA in loggers:
                    raise UserError(
                        f"{key.name}: an option file of this group needs a name for its logger; "
                        f"begin it with `# @package {key.name}.NAME`"
                    )
                for name in loggers:
                    _give_schema(loggers, str(name), key, key.name, f"{key.name}.{name}")
            elif "base" in key.metadata:
                _give_schema(cfg, key.name, key, key.name, key.name)
            elif key.name in groups():
                _check_keys(cfg[key.name], groups()[key.name][0], key.name)
        except UserError:
            if strict:
                raise
    if strict:
        _check_keys(cfg, Config)


def to_config(cfg: DictConfig) -> Config:
    """Return the typed config of a tree that has its schemas and no missing value.

    The schemas' own checks of ranges run here. Raises UserError.
    """
    values: dict[str, Any] = {}
    for name in map(str, cfg):
        node = cfg[name]
        try:
            values[name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except UserError:
            raise
        except OmegaConfBaseException as error:
            # An interpolation may stand where the schema wants a list, say.
            said = str(error).splitlines()[0]
            raise UserError(f"{error.full_key or name}: {said}") from error
        except ValueError as error:
            # The check of a custom schema, which need not know our UserError.
            raise UserError(f"{name}: {error}") from error
    return Config(**values)


def to_plain(value: Any) -> Any:
    """Return a typed config, or a part of it, as dicts, lists and scalars.

    A custom component with a schema names it under `_schema_`, so that it is found again; so does
    a custom class that was chosen over an option, for the schema of the option.
    """
    if isinstance(value, Component):
        plain = {key: to_plain(item) for key, item in component_keys(value).items()}
        schema = next(kind for kind in type(value).__mro__ if not is_inferred(kind))
        found_by_target = is_ours(schema) and value._target_.startswith(_OURS)
        is_base = getattr(schema, "_target_", MISSING) == MISSING
        named = {} if found_by_target or is_base else {SCHEMA: _dotted(schema)}
        return {"_target_": value._target_} | named | plain
    if is_dataclass(value):
        return {key: to_plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _give_schema(parent: Any, name: str, key: Field[Any], group: str, path: str) -> None:
    base = key.metadata["base"]
    node = _chosen(parent, name, group, path)
    target, custom = _target_of(node, path), _custom_schema(node, base, path)
    if custom is not None and is_ours(custom) and not target.startswith(_OURS):
        # A custom class that was chosen over an option of ours; it may have further keys.
        schema = _with_further_keys(custom, node, frozenset())
    else:
        schema = custom or _fitting_schema(node, target, base, group, path)
    _check_keys(node, schema, path)
    if OmegaConf.get_type(node) is not schema or SCHEMA in node:
        with open_dict(parent):
            parent[name] = _typed(schema, node, path)
        node = parent[name]
    for inner in components_of(schema):
        if OmegaConf.is_missing(node, inner.name):
            node[inner.name] = OmegaConf.structured(inner.metadata["default"])
        _give_schema(node, inner.name, inner, f"{group}/{inner.name}", f"{path}.{inner.name}")


def _chosen(parent: Any, name: str, group: str, path: str) -> Any:
    node = None if OmegaConf.is_missing(parent, name) else parent[name]
    if not OmegaConf.is_dict(node):
        allowed = ", ".join(option.name for option in options(group))
        raise UserError(f"{path}: no option is chosen; allowed are {allowed}")
    return node


def _target_of(node: Any, path: str) -> str:
    try:
        return _target(node, path)
    except OmegaConfBaseException as error:
        raw = OmegaConf.to_container(node, resolve=False)
        target = raw.get("_target_") if isinstance(raw, dict) else None
        said = str(error).splitlines()[0]
        raise UserError(f"{path}._target_={target}: cannot be resolved: {said}") from error


def _target(node: Any, path: str) -> str:
    target = "" if OmegaConf.is_missing(node, "_target_") else str(node.get("_target_") or "")
    if not target and SCHEMA in node:
        target = str(getattr(locate(f"{path}.{SCHEMA}", node[SCHEMA]), "_target_", ""))
    if "." not in target:
        raise UserError(f"{path}._target_={target}: must be the dotted path of a class")
    return target


def _custom_schema(node: Any, base: type, path: str) -> type | None:
    if SCHEMA not in node:
        kind = OmegaConf.get_type(node)
        if not isinstance(kind, type) or not issubclass(kind, base):
            return None
        return None if is_ours(kind) or is_inferred(kind) else kind
    schema = locate(f"{path}.{SCHEMA}", node[SCHEMA])
    if not (isinstance(schema, type) and is_dataclass(schema) and issubclass(schema, base)):
        raise UserError(
            f"{path}.{SCHEMA}={node[SCHEMA]}: must be a dataclass below {_dotted(base)}"
        )
    return schema


def _fitting_schema(node: Any, target: str, base: type, group: str, path: str) -> type:
    """Return our schema of a `_target_`, or for a custom class one with the keys it is given."""
    kind = OmegaConf.get_type(node)
    if not target.startswith(_OURS):
        given = kind if isinstance(kind, type) and issubclass(kind, base) else base
        if given is base:
            return _inferred(base, _further(base, node), frozenset(schema_keys(base)) - set(node))
        return _with_further_keys(given, node, getattr(given, "_not_given", frozenset()))
    schema = schema_of_target(group, target)
    if schema is None:
        known = [str(getattr(s, "_target_", "")) for s in groups()[group]]
        raise UserError(
            f"{path}._target_={target}: not a class for {path}; allowed are {', '.join(known)}, "
            f"or a custom class{did_you_mean(target, known)}"
        )
    if kind not in (schema, dict):
        option = next(iter(options_of(schema, group)), "")
        raise UserError(f"{path}._target_={target}: choose it by {group}={option}")
    return schema


def _with_further_keys(given: type, node: Any, not_given: frozenset[str]) -> type:
    """Return the schema `given`, or one below it that also has the node's further keys."""
    further = _further(given, node)
    return _inferred(given, further, not_given) if further else given


def _further(given: type, node: Any) -> tuple[str, ...]:
    known = (SCHEMA, *schema_keys(given))
    return tuple(str(key) for key in node if key not in known)


@cache
def _inferred(base: type, further: tuple[str, ...], not_given: frozenset[str]) -> type:
    """Return a schema below `base` that also has the keys `further`, of any type."""
    rows = [(key, Any, MISSING) for key in further]
    namespace = {"_not_given": not_given - {"_target_"}}
    return make_dataclass(f"Custom{base.__name__}", rows, bases=(base,), namespace=namespace)


def _typed(schema: type, node: Any, path: str) -> Any:
    # Untyped contents, so that a value is converted, or refused, as the schema says.
    plain: Any = OmegaConf.to_container(node)
    plain.pop(SCHEMA, None)
    inner = {key.name: plain.pop(key.name) for key in components_of(schema) if key.name in plain}
    try:
        empty = OmegaConf.structured(schema)
    except Exception as error:
        # A custom schema may hold an unknown annotation, or a default of another type.
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: its schema {_dotted(schema)} is wrong: {reason}") from error
    try:
        typed: Any = OmegaConf.merge(empty, plain)
    except OmegaConfBaseException as error:
        value = re.search(r"Value '(.*)' of type", str(error))
        if value and error.full_key in schema_keys(schema):
            raise UserError(wrong_value(schema, f"{path}.{error.full_key}", value[1])) from error
        raise UserError(f"{path}: {explain(error)}") from error
    for key, child in inner.items():
        typed[key] = child
    return typed


def _check_keys(node: Any, schema: type, path: str = "") -> None:
    known = schema_keys(schema)
    for key in node:
        if key not in known and key != SCHEMA:
            raise UserError(no_such_key(f"{path}.{key}".lstrip("."), known))


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
