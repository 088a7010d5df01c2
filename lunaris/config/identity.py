"""The keys that decide a run's numbers, and the number of processes. No torch."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from lunaris.config.keys import is_inferred, schemas_below
from lunaris.config.schema.base import Component, component_keys
from lunaris.config.schema.root import Config


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
    trainer = cfg.trainer
    sequences = trainer.batch_size * trainer.gradient_accumulation_steps * cfg.launch.world_size()
    return _flat(cfg, "") | {"global_batch": sequences}


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return "key: old → new" for every key in which two identities differ."""
    absent = object()
    rows = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b:
            shown = ["(absent)" if v is absent else v for v in (a, b)]
            rows.append(f"{key}: {shown[0]} → {shown[1]}")
    return rows


def _flat(value: Any, path: str) -> dict[str, Any]:
    free: set[str] = set()
    if is_dataclass(value):
        free = _free_keys(value.__class__)
        target = {"_target_": value._target_} if isinstance(value, Component) else {}
        value = target | component_keys(value)
    if not isinstance(value, dict) or not value:
        return {path: list(value) if isinstance(value, tuple) else value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key not in free:
            found |= _flat(item, f"{path}.{key}" if path else key)
    return found


@cache
def _free_keys(schema: type) -> set[str]:
    """Return the keys of a schema that are not part of a run's identity.

    The keys of a custom class without a schema are free where those of the same name are in a
    schema of the package for the same group, like `data.verify`.
    """
    kinds = [schema]
    if is_inferred(schema):
        above = schema.__mro__
        kinds += schemas_below(above[above.index(Component) - 1])
    return {
        key.name for kind in kinds for key in fields(kind) if not key.metadata.get("identity", True)
    }
