"""The groups, options and keys that exist, read from the schemas and the option files. No Hydra."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from lunaris.config.schema.root import Config
from lunaris.errors import did_you_mean

CONFIG_MODULE = "lunaris.conf"
# Chosen from the folder `experiment`; it has no keys.
EXPERIMENT = "experiment"
_SCHEMAS = "lunaris.config.schema"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MANY = {int: "whole numbers", float: "numbers", bool: "true or false values", str: "texts"}


class Option(NamedTuple):
    """An option file: its name and the comment that it opens with."""

    name: str
    summary: str


@cache
def groups() -> dict[str, list[type]]:
    """Return each group with the schemas of its options: "moe/router" is a group inside `moe`."""
    hints = get_type_hints(Config)
    found: dict[str, list[type]] = {}
    for key in fields(Config):
        if "base" in key.metadata:
            found[key.name] = schemas_below(key.metadata["base"])
        elif is_dataclass(hints[key.name]):
            found[key.name] = [hints[key.name]]
    for group in list(found):
        for schema in found[group]:
            for key in components_of(schema):
                found[f"{group}/{key.name}"] = schemas_below(key.metadata["base"])
    return found


def group_names() -> list[str]:
    """Return the names of all groups, `experiment` last."""
    return [*groups(), EXPERIMENT]


def components_of(schema: type) -> list[Field[Any]]:
    """Return the fields of a schema that hold a component."""
    return [key for key in fields(schema) if "base" in key.metadata]


def is_ours(schema: type | None) -> bool:
    """Return whether a schema is one of this package."""
    return schema is not None and schema.__module__.startswith(_SCHEMAS)


def is_inferred(schema: type | None) -> bool:
    """Return whether a schema was inferred from the keys that a custom class is given."""
    return schema is not None and "_not_given" in vars(schema)


def schema_keys(schema: type) -> list[str]:
    """Return the keys of a schema, in its order."""
    return [key.name for key in fields(schema)]


def schema_of_target(group: str, target: str) -> type | None:
    """Return the schema of a group whose `_target_` is `target`, or None."""
    return next((s for s in groups()[group] if getattr(s, "_target_", "") == target), None)


def schema_named(name: str) -> type | None:
    """Return the schema class of that name, or None."""
    found = {schema.__name__: schema for schemas in groups().values() for schema in schemas}
    return (found | {"Config": Config, "OpenConfig": Config}).get(name)


def all_keys() -> list[str]:
    """Return every dotted key that some choice of options has."""
    found = dict.fromkeys(schema_keys(Config))
    for group, schemas in groups().items():
        for schema in schemas:
            start = group.replace("/", ".")
            if group == "logger":
                start += f".{next(iter(options_of(schema, group)), 'NAME')}"
            found |= dict.fromkeys(f"{start}.{key}" for key in schema_keys(schema))
    return list(found)


def split_key(dotted: str) -> tuple[str, str]:
    """Return the innermost group of a dotted key, and the rest: ("moe/router", "x") for its x."""
    parts = dotted.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if "/".join(parts[:depth]) in groups():
            return "/".join(parts[:depth]), ".".join(parts[depth:])
    return parts[0], ".".join(parts[1:])


def flat(tree: Mapping[Any, Any], path: str = "") -> dict[str, Any]:
    """Return the keys of nested mappings, flat and dotted; an empty mapping stays a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            found |= flat(value, dotted)
        else:
            found[dotted] = value
    return found


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested dicts, the reverse of `flat`."""
    tree: dict[str, Any] = {}
    for dotted, value in keys.items():
        *above, last = dotted.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def options_having(dotted: str, config_dirs: list[Path] | None = None) -> list[str]:
    """Return the options of the key's group that have the key, like ["switch", "top2"]."""
    group, key = split_key(dotted)
    if group not in groups():
        return []
    having = [schema for schema in groups()[group] if key.partition(".")[0] in schema_keys(schema)]
    return [
        option.name
        for option in options(group, config_dirs)
        if schema_of_option(group, option.name, config_dirs) in having
    ]


def options_of(schema: type, group: str) -> list[str]:
    """Return the options of our own config tree that have a schema."""
    return [o.name for o in options(group) if schema_of_option(group, o.name, None) is schema]


@cache
def type_of(schema: type | None, key: str) -> Any:
    """Return the type of a key of a schema, or Any where there is none."""
    return get_type_hints(schema or object).get(key, Any)


def takes(schema: type, key: str) -> str:
    """Return what a key of a schema takes, in words: "a whole number or null"."""
    return _in_words(type_of(schema, key))


def nearest(name: str) -> str:
    """Return "; did you mean X?" for the key nearest to `name`, or "" for an existing key.

    The right key in the wrong group is found, and so is a key without its group: `n_experts`
    is taken for `moe.n_experts`. A name without a dot may also be a group's.
    """
    known = all_keys()
    last = name.rpartition(".")[2]
    if name in known:
        return ""
    for key in known:
        if "." in key and key.rpartition(".")[2] == last:
            return f"; did you mean {key}?"
    if name.partition(".")[0] in groups():
        return ""
    return did_you_mean(name, [key for key in known if ("." in key) == ("." in name)])


def folders() -> list[Path]:
    """Return the folder of our own options, as a list that others can be added to."""
    return [Path(str(resources.files(CONFIG_MODULE)))]


def options(group: str, config_dirs: list[Path] | None = None) -> list[Option]:
    """Return the options of `group`, sorted by name; those of later folders hide earlier ones."""
    files = _option_files(group, config_dirs)
    return [Option(name, _summary(files[name])) for name in sorted(files)]


@cache
def option_values(group: str, option: str) -> dict[str, Any]:
    """Return what the file of one of our own options sets, with the options that it extends."""
    from yaml import safe_load  # Only for the reference of keys.

    files = _option_files(group, None)
    tree = safe_load(files[option].read_text(encoding="utf-8")) or {}
    values: dict[str, Any] = {}
    for entry in tree.pop("defaults", []):
        if isinstance(entry, str) and entry in files:
            values |= option_values(group, entry)
    return values | tree


def _option_files(group: str, config_dirs: list[Path] | None) -> dict[str, Path]:
    return {
        file.stem: file
        for folder in reversed(config_dirs or folders())
        for file in sorted((folder / group).glob("*.y*ml"))
    }


def schema_of_option(group: str, option: str, config_dirs: list[Path] | None) -> type | None:
    """Return the schema that an option's file names, itself or by the option it extends."""
    if len(groups()[group]) == 1:
        return groups()[group][0]
    files = _option_files(group, config_dirs)
    seen: set[str] = set()
    while option in files and option not in seen:
        seen.add(option)
        text = files[option].read_text(encoding="utf-8")
        if named := re.search(r"/schema/(\w+)@", text):
            return schema_named(named[1])
        if target := re.search(r"^_target_: *(\S+)", text, re.MULTILINE):
            return schema_of_target(group, target[1])
        begins = re.search(r"^defaults: *\[? *-? *(\w+)|^ *- +(\w+)$", text, re.MULTILINE)
        option = (begins[1] or begins[2]) if begins else ""
    return None


def schemas_below(base: type) -> list[type]:
    """Return the schemas of the package below `base` that have a `_target_`."""
    found: list[type] = []
    children: list[type] = base.__subclasses__()
    for child in children:
        if is_ours(child):
            found += [child] if getattr(child, "_target_", "???") != "???" else []
            found += schemas_below(child)
    return found


def _summary(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = (line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    # An experiment opens with the command that runs it.
    return next((text for text in texts if not text.startswith(("@", "lunaris "))), "")


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        named = [_in_words(part) for part in inner if part is not type(None)]
        return " or ".join(named + ["null"] * (type(None) in inner))
    if origin is list:
        return f"a list of {_MANY.get(inner[0], 'values')}"
    if origin is tuple:
        return f"a list of {len(inner)} {_MANY.get(inner[0], 'values')}"
    if origin is dict or is_dataclass(kind):
        return "a map, like {name: value}"
    return _WORDS.get(kind, "a value")
