"""The overrides of a command line: parsed, checked against the config tree, applied."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lunaris.config.hydra_internals import override_parser
from lunaris.config.keys import (
    EXPERIMENT,
    flat,
    group_names,
    is_inferred,
    nearest,
    options,
    schema_keys,
    type_of,
)
from lunaris.config.messages import no_such_key, shown, wrong_value
from lunaris.config.schema.root import Config
from lunaris.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


_UNKNOWN = object()


def parse(overrides: list[str], config_loader: ConfigLoader | None = None) -> list[Override]:
    """Return the parsed overrides. Raises UserError for one that is not KEY=VALUE.

    config_loader: needed to take the values of a `glob(…)`.
    """
    if config_loader is None:
        return [_parsed(text) for text in overrides]
    return [_parse_one(text, config_loader) for text in overrides]


def _parse_one(text: str, config_loader: ConfigLoader | None = None) -> Override:
    from hydra.errors import HydraException

    try:
        (parsed,) = override_parser(config_loader).parse_overrides([text])
    except HydraException as error:
        raise UserError(_bad_syntax(text)) from error
    return parsed


# The points of a sweep have most of their overrides in common, and the parser takes milliseconds.
_parsed = lru_cache(maxsize=4096)(_parse_one)


def quoted(text: str) -> str:
    """Return `text` quoted, so that the grammar of overrides reads it unchanged."""
    # A backslash is an escape before a quote and at the end only.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def check(parsed: list[Override], config_dirs: list[Path], *, sweep: bool = False) -> None:
    """Raise UserError for the first override that names no group, option or key of the tree.

    A key inside a group is checked when the group's option is known, by `apply` or `give_schemas`.
    """
    further = any(o.key_or_group == "hydra.searchpath" for o in parsed)
    for override in parsed:
        if override.is_hydra_override():
            continue
        text = override.input_line or ""
        root = re.split("[./]", override.key_or_group)[0]
        if root not in schema_keys(Config):
            key = override.key_or_group
            hint = nearest(key) or f"; allowed are {', '.join(schema_keys(Config))}"
            raise UserError(f"{key}: no such key or group{hint}")
        if override.package is not None:
            raise UserError(f"{text}: a group has one place; write {override.key_or_group}=OPTION")
        if override.is_delete():
            raise UserError(_cannot_remove(override))
        if override.is_sweep_override():
            if not sweep:
                raise UserError(
                    f"{text}: several values; add -m to sweep over them, or write [a,b] for a list"
                )
            continue
        if override.key_or_group in group_names():
            _check_option(override, config_dirs, certain=not further)


def open_maps(parsed: list[Override]) -> list[str]:
    """Return the overrides as texts in which no entry of a free map needs a plus.

    What lies deeper than two levels may be an entry of a map, like
    `launch.additional_parameters.mail_type=END`. `experiment=null` is the default, which Hydra
    does not take from a command line.
    """
    from hydra.core.override_parser.types import OverrideType

    return [
        f"++{o.input_line}"
        if o.key_or_group.count(".") > 1
        and o.type is OverrideType.CHANGE
        and not o.is_hydra_override()
        else o.input_line or ""
        for o in parsed
        if not (o.key_or_group == EXPERIMENT and o.value() is None)
    ]


def is_group_choice(override: Override) -> bool:
    """Return whether the override chooses an option, or belongs to Hydra."""
    return override.is_hydra_override() or (
        override.key_or_group in group_names() and not isinstance(override.value(), dict)
    )


def keys_of(override: Override) -> list[str]:
    """Return the dotted keys that an override sets."""
    key, value = override.key_or_group, override.value()
    return list(flat(value, key)) if isinstance(value, dict) else [key]


def apply(cfg: DictConfig, override: Override, choice: str | None = None) -> None:
    """Set one key of `cfg` as Hydra would; `choice`: the option chosen for the key's group.

    Raises UserError when the schema has no such key, or when the key cannot take the value.
    """
    key, value = override.key_or_group, override.value()
    added = override.is_add() or override.is_force_add()
    if override.is_add() and not isinstance(value, dict | list):
        if OmegaConf.select(cfg, key) is not None:
            raise UserError(f"+{key}: the key exists already; write {key}=… without the plus")
    for name, part in _leaves(cfg, key, value):
        if not added:
            _check_key(cfg, name, choice)
        schema = _schema_of_parent(cfg, name)
        part = as_taken(schema, name, part)
        try:
            with open_dict(cfg):
                OmegaConf.update(cfg, name, part, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise UserError(wrong_value(schema, name, part)) from error


def as_taken(schema: type | None, key: str, value: Any) -> Any:
    """Return a value for a dotted key as OmegaConf takes it; schema: of the key's parent.

    Raises UserError for a number in place of true or false, which OmegaConf would take.
    """
    wanted = type_of(schema, key.rpartition(".")[2])
    if type(value) in (int, float) and wanted is bool:
        raise UserError(wrong_value(schema, key, value))
    if wanted in (int, int | None) and isinstance(value, float) and value.is_integer():
        # Hydra reads 1e3 as a float; one of 2**53 or more is not exact.
        return int(value) if abs(value) < 2**53 else value
    return value


def has_key(cfg: DictConfig, key: str) -> bool:
    """Return whether a composed tree has a dotted key, or a free map that takes it."""
    try:
        _check_key(cfg, key, None)
    except UserError:
        return False
    return True


def _leaves(cfg: DictConfig, key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key and value that a map sets, down to where the schemas end."""
    node = OmegaConf.select(cfg, key, throw_on_missing=False) if isinstance(value, dict) else None
    if not OmegaConf.is_dict(node) or OmegaConf.get_type(node) is dict:
        yield key, value
        return
    for name, part in value.items():
        yield from _leaves(cfg, f"{key}.{name}", part)


def _check_key(cfg: DictConfig, key: str, choice: str | None) -> None:
    """Raise UserError, naming the nearest key, unless `cfg` has the dotted `key`."""
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        if node is None and depth > 1 or node is _UNKNOWN:
            return  # Inside a value that is not given yet.
        if not OmegaConf.is_dict(node):
            raise UserError(f"{key}: {here} is a value, it has no keys of its own")
        kind = OmegaConf.get_type(node)
        if part not in list(node):  # the node itself says no for a key whose value is missing
            if here == "logger":
                raise UserError(_no_such_logger(key, part, list(node)))
            component = here.replace(".", "/") in group_names() or here.startswith("logger.")
            if kind is dict and not component:
                return  # An entry of a free map, like `launch.additional_parameters`.
            if kind is dict or is_inferred(kind):
                raise UserError(f"{key}: the chosen option lacks it; write +{key}=… to add it")
            known = [str(name) for name in node if name != "hydra"]
            raise UserError(no_such_key(f"{here}.{part}".lstrip("."), known, choice))
        fixed = not (OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part))
        node = node[part] if fixed else _UNKNOWN


def _no_such_logger(key: str, name: str, chosen: list[str]) -> str:
    known = [option.name for option in options("logger")]
    if name in known:
        choice = ",".join([*chosen, name])
        return f"{key}: the logger {name} is not chosen; choose it by logger=[{choice}]"
    hint = nearest(key) or f"; the chosen loggers are {', '.join(chosen)}"
    return f"{key}: no such key{hint}"


def _schema_of_parent(cfg: DictConfig, key: str) -> type | None:
    parent = key.rpartition(".")[0]
    node = OmegaConf.select(cfg, parent) if parent else cfg
    kind = OmegaConf.get_type(node) if OmegaConf.is_dict(node) else None
    return kind if kind is not dict else None


def _check_option(override: Override, config_dirs: list[Path], *, certain: bool) -> None:
    group, value = override.key_or_group, override.value()
    if isinstance(value, dict):
        return
    plain = f"{group}={shown(value)}"
    if override.is_add() or override.is_force_add():
        raise UserError(f"{override.input_line}: {group} is chosen already; write {plain}")
    if value is None and group == EXPERIMENT:
        return
    known = [option.name for option in options(group, config_dirs)]
    for name in value if isinstance(value, list) else [value]:
        nested = any((folder / group / f"{name}.yaml").is_file() for folder in config_dirs)
        if certain and name not in known and not nested:
            raise UserError(
                f"{group}={shown(name)}: no such option; allowed are {', '.join(known)}"
                f"{did_you_mean(str(name), known)}"
            )


def _cannot_remove(override: Override) -> str:
    key = override.key_or_group
    if key in group_names():
        names = ", ".join(option.name for option in options(key))
        return f"~{key}: a group cannot be removed; allowed are {key}=…: {names}"
    return f"~{key}: a key cannot be removed, only given another value{nearest(key)}"


def _bad_syntax(text: str) -> str:
    if not text.strip():
        return "'': an empty override; write KEY=VALUE"
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        return f"{text}: no such flag; overrides are KEY=VALUE"
    if not equals:
        return f"{text}: not an override; write {key}=VALUE{nearest(key.lstrip('+~'))}"
    return (
        f"{text}: the value cannot be read; put one that holds spaces or any of = : , [ ] {{ }} "
        f"( ) in quotes, twice for the shell: {key}='\"{value}\"'"
    )
