"""What keys there are and what each takes, in words. No Hydra."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from lunaris.config.schema.root import SCHEMAS, Config
from lunaris.errors import did_you_mean

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MANY = {int: "whole numbers", float: "numbers", bool: "true or false values", str: "texts"}


def schema_keys(schema: type) -> list[str]:
    """Return the keys of a schema, in its order."""
    return [f.name for f in fields(schema)]


def all_keys() -> list[str]:
    """Return every dotted key that some choice of options has."""
    found = dict.fromkeys(schema_keys(Config))
    for group, options in SCHEMAS.items():
        for schema in options.values():
            found |= dict.fromkeys(f"{group}.{key}" for key in schema_keys(schema))
    return list(found)


def options_having(dotted: str) -> list[str]:
    """Return the options of the key's group that have the key, like ["switch", "top2"]."""
    group, _, key = dotted.partition(".")
    return [
        option
        for option, schema in SCHEMAS.get(group, {}).items()
        if key.partition(".")[0] in schema_keys(schema)
    ]


def schema_of_target(group: str, target: str) -> type | None:
    """Return the schema whose `_target_` is `target`, or None."""
    for schema in SCHEMAS[group].values():
        if getattr(schema, "_target_", None) == target:
            return schema
    return None


def schema_named(name: str) -> type | None:
    """Return the schema class of that name, or None."""
    found = {schema.__name__: schema for by_name in SCHEMAS.values() for schema in by_name.values()}
    return (found | {Config.__name__: Config}).get(name)


def takes(schema: type, key: str) -> str:
    """Say what the key of a schema takes: "a whole number or null"."""
    return _in_words(get_type_hints(schema).get(key, Any))


def is_switch(dotted: str) -> bool:
    """Say whether the key takes true or false in every option that has it."""
    group, _, key = dotted.partition(".")
    having = [s for s in SCHEMAS.get(group, {}).values() if key in schema_keys(s)]
    return bool(having) and all(get_type_hints(s)[key] is bool for s in having)


def nearest(name: str) -> str:
    """Return "; did you mean X?" for the key nearest to `name`, or an empty string.

    The right key in the wrong group is found, and so is a key without its group: `n_experts`
    is taken for `moe.n_experts`. A name without a dot may also be a group's.
    """
    known = all_keys()
    last = name.rpartition(".")[2]
    ending = [key for key in known if "." in key and key.rpartition(".")[2] == last]
    if ending and name not in ending:
        return f"; did you mean {ending[0]}?"
    if name.partition(".")[0] in SCHEMAS:
        return ""
    if "." in name:
        return did_you_mean(name, [key for key in known if "." in key])
    return did_you_mean(name, [key for key in known if "." not in key])


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
