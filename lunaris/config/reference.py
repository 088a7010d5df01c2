"""Every key of the config with what it takes, its default and its meaning. No torch, no Hydra.

The meaning of a key is the comment above it in its schema.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, NamedTuple

from omegaconf import MISSING as UNSET

from lunaris.config.keys import components_of, groups, option_values, options_of, takes
from lunaris.config.messages import shown
from lunaris.config.schema.root import Config
from lunaris.errors import UserError, did_you_mean


class Key(NamedTuple):
    """One key of a group. `options`: those of the group that have it; empty where all do."""

    name: str
    takes: str
    default: str
    about: str
    when: str
    options: tuple[str, ...]


# When a key may have another value: `Key.when`.
ANY_TIME, RECORDED, NEW_RUN = "any time", "by resume", "new run"


class Section(NamedTuple):
    """The keys of a group, in the order of its schemas; `about`: what some of its options are."""

    group: str
    about: list[tuple[tuple[str, ...], str]]
    keys: list[Key]


@cache
def sections() -> list[Section]:
    """Return the keys that stand above all groups, then each group's."""
    whole = Section("", [], [_key("", "", Config, item, ()) for item in _plain(Config)])
    return [whole, *(_section(group, schemas) for group, schemas in groups().items())]


def find(names: list[str]) -> list[Section]:
    """Return the keys of groups and options with these names, and those whose names contain one.

    Raises UserError for a name that is in no key, with the nearest that is.
    """
    found: dict[str, Section] = {}
    for name in names:
        hits = [
            section._replace(keys=[key for key in section.keys if _matches(name, section, key)])
            for section in sections()
        ]
        hits = [section for section in hits if section.keys]
        if not hits:
            known = {key.name for section in sections() for key in section.keys}
            known |= {section.group for section in sections()} - {""}
            known |= {key.rpartition(".")[2] for key in known}
            known |= {each for section in sections() for each in _options_of(section)}
            near = did_you_mean(name, sorted(known)) or "; `lunaris keys` lists all"
            raise UserError(f"{name}: no such group or key{near}")
        for section in hits:
            before = found.get(section.group)
            keys = [*(before.keys if before else ()), *section.keys]
            found[section.group] = section._replace(keys=list(dict.fromkeys(keys)))
    return list(found.values())


def _matches(name: str, section: Section, key: Key) -> bool:
    if section.group in (name, name.replace(".", "/")) or name in key.name:
        return True
    return name in (key.options or _options_of(section))


def _options_of(section: Section) -> list[str]:
    return [option for options, _ in section.about for option in options]


def _section(group: str, schemas: list[type]) -> Section:
    start = group.replace("/", ".")
    by_schema = {schema: tuple(options_of(schema, group)) for schema in schemas}
    used = {schema: names for schema, names in by_schema.items() if names}
    keys: dict[Key, Key] = {}
    for schema, names in used.items():
        prefix = f"{start}.{names[0]}" if group == "logger" else start
        for item in _plain(schema):
            made = _key(group, prefix, schema, item, names)
            # Equal keys of several options stand there once.
            before = keys.get(made, made)
            keys[made] = made._replace(options=(*before.options, *names))
    every = {name for names in used.values() for name in names}
    rows = [key._replace(options=() if {*key.options} == every else key.options)
            for key in keys.values()]  # fmt: skip
    about = [(names, _first_sentence(schema)) for schema, names in used.items()]
    return Section(group, about, rows)


def _defaults(group: str, options: tuple[str, ...], item: Field[Any]) -> str:
    """Return the default of a key, and the options that give it another one."""
    usual = item.default if item.default_factory is MISSING else item.default_factory()
    others = [
        f"{option}: {_shown(value)}" for option in options
        if (value := option_values(group, option).get(item.name, usual)) != usual
    ]  # fmt: skip
    return f"{_shown(usual)} ({', '.join(others)})" if others else _shown(usual)


def _when(group: str, item: Field[Any]) -> str:
    """Return when a key may have another value; a whole group may be free or changeable."""
    outer: Mapping[str, Any] = {key.name: key.metadata for key in fields(Config)}.get(group, {})
    free = not (outer.get("identity", True) and item.metadata.get("identity", True))
    if free:
        return ANY_TIME
    changeable = outer.get("changeable") or item.metadata.get("changeable")
    return RECORDED if changeable else NEW_RUN


def _plain(schema: type) -> list[Field[Any]]:
    """Return the fields that are keys with a value, and not groups of their own."""
    nested = {item.name for item in components_of(schema)} | {"_target_"}
    return [item for item in fields(schema) if item.name not in nested | groups().keys()]


def _key(group: str, start: str, schema: type, item: Field[Any], options: tuple[str, ...]) -> Key:
    """Return a key of a schema without the options that have it. options: of the schema."""
    name = f"{start}.{item.name}".lstrip(".")
    kind = _kind(takes(schema, item.name), item.metadata.get("limits") or {})
    owner = next(kind for kind in schema.__mro__ if item.name in _comments(kind))
    about = _comments(owner)[item.name]
    return Key(name, kind, _defaults(group, options, item), about, _when(group, item), ())


def _shown(default: Any) -> str:
    return "must be given" if default is MISSING or default == UNSET else shown(default)


def _kind(type_words: str, limits: dict[str, Any]) -> str:
    """Return what a key takes, in words: "a number, above 0", "bf16, fp16, fp32"."""
    words = {"low": "at least", "high": "at most", "above": "above", "at_most": "at most"}
    if "allowed" in limits:
        return ", ".join(limits["allowed"]) + (" or null" if "null" in type_words else "")
    found = [f"{words[name]} {value:,}" for name, value in limits.items()]
    return f"{type_words}{', ' if found else ''}{' and '.join(found)}"


@cache
def _comments(schema: type) -> dict[str, str]:
    """Return the comment above each key that a class itself declares; "" where there is none."""
    if schema is object:
        return {}
    source = textwrap.dedent(inspect.getsource(schema))
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        first = item.lineno - 1
        while lines[first - 1].strip().startswith("#"):
            first -= 1
        above = (line.strip().removeprefix("#").strip() for line in lines[first : item.lineno - 1])
        found[item.target.id] = " ".join(above)
    return found


def _first_sentence(schema: type) -> str:
    paragraph = inspect.cleandoc(schema.__doc__ or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def as_text(chosen: list[Section]) -> str:
    """Return the keys for a terminal, 80 columns wide."""
    lines = []
    for section in chosen:
        lines += ["", section.group or "above all groups"]
        for key in section.keys:
            lines.append(f"  {key.name} = {key.default}")
            of = f" Only of {', '.join(key.options)}." if key.options else ""
            said = f"{key.about} Takes {key.takes}; {key.when}.{of}"
            lines += textwrap.wrap(said, 74, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines[1:])


_PREFACE = """\
# Every key

`lunaris keys NAME …` prints these for a group or a part of a key's name; this page is what
`lunaris keys --markdown` prints. `[option]` names the options of the group that have the key, where
not all do; after a default, in parentheses, stand options that set another one.

The last column says when a key may have another value: at *any time*, since it changes where and
how fast a run trains, not its numbers; *by resume*: `lunaris resume DIR KEY=VALUE` changes it in
the middle of a run and records the change; or only in a *new run*."""


def as_markdown(chosen: list[Section]) -> str:
    """Return the keys as a page of documentation."""
    lines = [_PREFACE]
    for section in chosen:
        lines += ["", f"## `{section.group}`" if section.group else "## Above all groups", ""]
        if section.about:
            about = (
                (" ".join(f"`{name}`" for name in names), text) for names, text in section.about
            )
            lines += [*(f"- {names}: {text}" for names, text in about), ""]
        lines += ["| key | default | meaning | takes | when |", "|---|---|---|---|---|"]
        for key in section.keys:
            of = f" [{', '.join(key.options)}]" if key.options else ""
            cells = (f"`{key.name}`{of}", f"`{key.default}`", key.about, key.takes, key.when)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
