"""The keys that decide a run's numbers, and the number of processes. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from lunaris.config.keys import is_inferred, is_ours, schemas_below
from lunaris.config.schema.base import Component, component_keys
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO

# Of the identity: sequences per optimizer step.
GLOBAL_BATCH = "global_batch"


def world_size(cfg: Config) -> int:
    """Return the number of processes that will train: torchrun's, or what `launch` asks for."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return cfg.launch.world_size()


def identity(cfg: Config) -> dict[str, Any]:
    """Return the keys that decide a run's numbers, flat and dotted.

    Which they are is metadata of each schema's fields (`lunaris.config.schema.base.FREE`). Batch
    size, accumulation and processes count only by their product, `global_batch` (sequences per
    optimizer step), since a run may be continued at another world size.
    """
    found = {key: value for key, (value, level) in _flat(cfg, "").items() if level != "free"}
    return found | {GLOBAL_BATCH: _global_batch(cfg)}


def every_key(cfg: Config) -> dict[str, Any]:
    """Return all keys of a config, flat and dotted, and `global_batch`."""
    found = {key: value for key, (value, _) in _flat(cfg, "").items()}
    return found | {GLOBAL_BATCH: _global_batch(cfg)}


def fixed_keys(cfg: Config) -> set[str]:
    """Return the keys that say what the weights of a run are: none of them may change in it."""
    return {key for key, (_, level) in _flat(cfg, "").items() if level == "fixed"}


def left_open(key: str, value: Any) -> bool:
    """Return whether the device decides this key of an identity; any value agrees with that."""
    return key == "trainer.precision" and bool(value == AUTO)


def keep_choices(cfg: Config, before: Config) -> None:
    """Set what `cfg` leaves to the device to what was decided in `before`, of the same run."""
    if cfg.trainer.precision == AUTO:
        cfg.trainer.precision = before.trainer.precision


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return "key: old → new" for every key in which two identities differ."""
    absent = object()
    rows = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b and not (left_open(key, a) or left_open(key, b)):
            shown = ["(absent)" if v is absent else v for v in (a, b)]
            rows.append(f"{key}: {shown[0]} → {shown[1]}")
    return rows


def _global_batch(cfg: Config) -> int:
    trainer = cfg.trainer
    return trainer.batch_size * trainer.gradient_accumulation_steps * cfg.launch.world_size()


def _flat(value: Any, path: str, level: str = "fixed") -> dict[str, tuple[Any, str]]:
    """Return the value and the level of each key below `path`; see `_level_of`."""
    levels: dict[str, str] = {}
    if is_dataclass(value):
        levels = _levels(value.__class__)
        target = {"_target_": value._target_} if isinstance(value, Component) else {}
        value = target | component_keys(value)
    if not isinstance(value, dict) or not value:
        return {path: (list(value) if isinstance(value, tuple) else value, level)}
    found: dict[str, tuple[Any, str]] = {}
    for key, item in value.items():
        inner = levels.get(key, "fixed") if level == "fixed" else level
        if level == "changeable" and levels.get(key) == "free":
            inner = "free"
        found |= _flat(item, f"{path}.{key}" if path else key, inner)
    return found


@cache
def _levels(schema: type) -> dict[str, str]:
    """Return the level of each key of a schema that is not fixed.

    A key of a custom class that states no level takes that of the same name in a schema of the
    package for the same group, like `data.verify` or `optimizer.learning_rate`.
    """
    found = _own_levels(schema)
    if issubclass(schema, Component) and (is_inferred(schema) or not is_ours(schema)):
        above = schema.__mro__
        for other in schemas_below(above[above.index(Component) - 1]):
            for name, level in _own_levels(other).items():
                if is_inferred(schema) or level == "changeable":
                    found.setdefault(name, level)
    return found


def _own_levels(schema: type) -> dict[str, str]:
    levels = {key.name: _level_of(key.metadata) for key in fields(schema)}
    return {name: level for name, level in levels.items() if level != "fixed"}


def _level_of(metadata: Mapping[str, Any]) -> str:
    """Return `free` (not part of the identity), `changeable` (by a recorded change) or `fixed`."""
    if not metadata.get("identity", True):
        return "free"
    return "changeable" if metadata.get("changeable") else "fixed"
