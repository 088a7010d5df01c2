"""The messages for a wrong config: the dotted key, the value and what is allowed. No Hydra."""

from __future__ import annotations

import re
from typing import Any

from lunaris.config.keys import nearest, options_having, schema_keys, schema_named, split_key, takes
from lunaris.errors import did_you_mean


def no_such_key(key: str, known: list[str], choice: str | None = None) -> str:
    """Return the message for a dotted key that does not exist. known: the names next to it.

    choice: the option that is chosen for the key's group, if it is known.
    """
    elsewhere = options_having(key)
    if elsewhere:
        name = split_key(key)[0]
        chosen = f"{name}={choice}" if choice else f"the chosen option of {name}"
        choices = ", ".join(f"{name}={option}" for option in elsewhere)
        have = "have" if len(elsewhere) > 1 else "has"
        return f"{key}: {chosen} has no such key; {choices} {have} it"
    last = key.rpartition(".")[2]
    outer = key.removesuffix(last)
    meant = _abbreviated(last, known) or did_you_mean(last, known)
    near = meant.replace("you mean ", f"you mean {outer}") or nearest(key)
    keys = ", ".join(f"{outer}{name}" for name in known if name != "_target_")
    allowed = f"; allowed are {keys}" if keys else "; the chosen option has no keys"
    return f"{key}: no such key{near or allowed}"


def _abbreviated(name: str, known: list[str]) -> str:
    """Return "; did you mean learning_rate?" for lr, the initials of one known name."""
    meant = [k for k in known if "_" in k and "".join(part[:1] for part in k.split("_")) == name]
    return f"; did you mean {meant[0]}?" if len(meant) == 1 else ""


def wrong_value(schema: type | None, key: str, value: Any) -> str:
    """Return the message for a value that is not of the key's type; schema: of its parent."""
    last = key.rpartition(".")[2]
    if schema is not None and last in schema_keys(schema):
        return f"{key}={shown(value)}: must be {takes(schema, last)}"
    return f"{key}={shown(value)}: not a value that {key} can take"


def shown(value: Any) -> str:
    """Return a value in the form of an override: null, true, [1,2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(shown(item) for item in value)}]"
    return str(value)


def explain(error: BaseException) -> str:
    """Return the message, one line or two, for an error of Hydra or OmegaConf.

    Their hints to use a plus are left out, because a key that no schema has is refused anyway.
    """
    text = f"{error}\n{error.__cause__ or ''}"
    place = re.search(r"In '([^']+)'", text)
    start = f"{place[1]}: " if place and place[1] not in ("train", "hydra/config") else ""
    full_key = re.search(r"full_key: (\S+)", text)
    key = full_key[1] if full_key else ""
    owner = re.search(r"object_type=(\w+)", text)
    if absent := re.search(r"Key '[^']+' not in '(\w+)'", text):
        if schema := schema_named(absent[1]):
            return start + no_such_key(key, schema_keys(schema))
    if owner and (of_type := re.search(r"Value '(.*)' of type", text)):
        return start + wrong_value(schema_named(owner[1]), key, of_type[1])
    if group := re.search(r"Could not override '([^']+)'", text):
        outer, _, inner = group[1].rpartition("/")
        return f"{start}{group[1]}: the chosen option of {outer or 'the config'} has no {inner}"
    if option := re.search(r"Could not find '([^']+)'", text):
        available = re.findall(r"^\t(\w[^=\n]*)$", text, re.MULTILINE)
        outer, _, name = option[1].rpartition("/")
        allowed = f"; allowed are {', '.join(available)}" if available else ""
        return (
            f"{start}{outer or 'config'}={name}: no such option{allowed}"
            f"{did_you_mean(name, available)}"
        )
    hint = r"use \+|append to|full_key|_type=|https?://"
    lines = str(error).removeprefix(f"In '{place[1]}': " if place else "").splitlines()
    kept = [line.strip() for line in lines if line.strip() and not re.search(hint, line)]
    return start + ("; ".join(kept) or "the config cannot be composed")
