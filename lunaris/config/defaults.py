"""The defaults of a person or a site: a folder of options, and the keys in its `defaults.yaml`.

The folder is $LUNARIS_CONFIG_DIR, else `lunaris` in $XDG_CONFIG_HOME or in ~/.config. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from lunaris.config.keys import (
    EXPERIMENT,
    flat,
    groups,
    nearest,
    nested,
    options,
    schema_keys,
    schema_of_option,
    split_key,
)
from lunaris.config.messages import no_such_key, shown, wrong_value
from lunaris.config.overrides import as_taken, check, has_key, parse
from lunaris.config.schema.base import check_limits
from lunaris.config.schema.root import Config
from lunaris.console import labelled
from lunaris.errors import UserError

VARIABLE, FILE = "LUNARIS_CONFIG_DIR", "defaults.yaml"


@dataclass(frozen=True)
class Defaults:
    """What a `defaults.yaml` sets; without a file, nothing.

    keys: values by dotted key. choices: the option, or a list of them, by group.
    """

    file: Path | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    def option(self, keys: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the content of an option file of Hydra's with the choices and with `keys`."""
        chosen = [{f"override /{group}": option} for group, option in self.choices.items()]
        return ({"defaults": chosen} if chosen else {}) | nested(keys or {})

    def fitting(self, tree: DictConfig) -> dict[str, Any]:
        """Return the keys that the chosen options of a composed tree have, with their values."""
        return {key: value for key, value in flat(self.keys).items() if has_key(tree, key)}

    def line(self, applied: dict[str, Any]) -> str:
        """Return the line that names what the file changed; applied: values by key."""
        home, file = os.path.expanduser("~"), str(self.file)
        if file.startswith(home + os.sep):
            file = f"~{file[len(home) :]}"
        pairs = ", ".join(f"{key}={shown(value)}" for key, value in applied.items())
        return labelled("defaults", f"{file}: {pairs}")


def user_folder() -> Path | None:
    """Return the folder, or None where there is none; an empty $LUNARIS_CONFIG_DIR means none.

    Raises UserError where the variable names no folder.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        above = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
        folder = Path(os.path.expanduser(above), "lunaris")
        return folder if folder.is_dir() else None
    if not named.strip():
        return None
    folder = Path(os.path.expanduser(named))
    if not folder.is_dir():
        raise UserError(f"{VARIABLE}={named}: no such folder; empty: none")
    return folder


def read_defaults(config_dirs: list[Path]) -> Defaults:
    """Return what the folder's `defaults.yaml` sets. config_dirs: the folders of all options.

    Raises UserError, which names the file, for one that cannot be read, for a key that no option
    has, and for a value that its key cannot take.
    """
    folder = user_folder()
    file = folder / FILE if folder is not None else None
    if file is None or not file.is_file():
        return Defaults()
    keys: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    try:
        for key, value in _leaves(_read(file)):
            if key in groups() and isinstance(value, str | list):
                check(parse([f"{key}={shown(value)}"]), config_dirs)
                choices[key] = value
            else:
                keys[key] = _checked(key, value, config_dirs)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return Defaults(file.absolute(), keys, choices)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
        raise UserError(f"cannot be read: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError("must be a map of keys, like launch: {partition: gpu}")
    return tree


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a map of groups with its value; an empty group has none."""
    for name, value in tree.items():
        key = f"{above}.{name}".lstrip(".").replace("/", ".")
        group = key.replace(".", "/") in groups() or above == "logger"
        if group and isinstance(value, dict):
            yield from _leaves(value, key)
        elif not (group and value is None):
            yield key, value


def _checked(key: str, value: Any, config_dirs: list[Path]) -> Any:
    """Return a value as its key takes it. Raises UserError for an unknown key or a wrong value."""
    if key.replace(".", "/") in groups():
        raise UserError(f"{key}={shown(value)}: must be a map of keys")
    if key in ("name", EXPERIMENT):
        raise UserError(f"{key}={shown(value)}: cannot be a default; give it on the command line")
    schemas, rest = _schemas(key, config_dirs)
    first = rest.partition(".")[0]
    schema = next((s for s in schemas if first in schema_keys(s)), None)
    if schema is None:
        if _in_option_file(key, config_dirs):
            return value
        known = dict.fromkeys(name for each in schemas for name in schema_keys(each))
        raise UserError(no_such_key(key, list(known)))
    if schema is Config and first != rest:
        raise UserError(f"{key}: {first} is a value, it has no keys of its own")
    if first != rest:
        return value  # An entry of a free map, like `launch.additional_parameters`.
    value = as_taken(schema, key, value)
    tree = OmegaConf.structured(schema)
    try:
        OmegaConf.update(tree, rest, value, merge=True)
    except OmegaConfBaseException as error:
        raise UserError(wrong_value(schema, key, value)) from error
    limits = next(item.metadata.get("limits") for item in fields(schema) if item.name == rest)
    if limits and not (isinstance(value, str) and "${" in value):
        # As the key's type has it: a number may be written in quotes.
        check_limits(key, tree[rest], **limits)
    return value


def _schemas(key: str, config_dirs: list[Path]) -> tuple[list[type], str]:
    """Return the schemas of all options that may have a dotted key, and the key's name there."""
    root = key.partition(".")[0]
    group, rest = split_key(key)
    if root not in schema_keys(Config):
        hint = nearest(key) or f"; allowed are {', '.join(schema_keys(Config))}"
        raise UserError(f"{key}: no such key or group{hint}")
    if root != "logger":
        return (groups()[group], rest) if rest and group in groups() else ([Config], key)
    name, _, rest = rest.partition(".")
    known = [option.name for option in options(root, config_dirs)]
    if name not in known:
        raise UserError(no_such_key(f"{root}.{name}", known))
    schema = schema_of_option(root, name, config_dirs)
    if not rest:
        raise UserError(f"{key}: must be a map of the keys of this logger")
    return [] if schema is None else [schema], rest


def _in_option_file(key: str, config_dirs: list[Path]) -> bool:
    """Return whether an option of a custom class, which needs no schema, sets the key."""
    group, rest = split_key(key)
    if group == "logger":
        rest = rest.partition(".")[2]
    for folder in config_dirs:
        for file in (folder / group).glob("*.y*ml"):
            try:
                content = safe_load(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, YAMLError):
                continue
            if isinstance(content, dict) and rest.partition(".")[0] in content:
                return True
    return False
