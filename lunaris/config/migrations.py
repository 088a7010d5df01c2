"""How the config file of an older version becomes one of today. No torch.

A config file holds `config_version`; one without it is of version 1. Reading it applies, in order,
the rows of MIGRATIONS above its version; then a key that it lacks takes its default. A new key's
default must therefore keep the numbers of old runs; where it does not, a `DefaultChanged` row gives
the old value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lunaris.errors import UserError

VERSION_KEY = "config_version"


@dataclass(frozen=True)
class Renamed:
    """A key that has another dotted name from `version` on."""

    version: int
    old: str
    new: str

    def apply(self, tree: dict[str, Any]) -> None:
        value = _pop(tree, self.old)
        if value is not _ABSENT:
            _put(tree, self.new, value)


@dataclass(frozen=True)
class Removed:
    """A key that does not exist any more from `version` on."""

    version: int
    key: str

    def apply(self, tree: dict[str, Any]) -> None:
        _pop(tree, self.key)


@dataclass(frozen=True)
class DefaultChanged:
    """A key whose default is another from `version` on; `old` is what older files meant."""

    version: int
    key: str
    old: Any

    def apply(self, tree: dict[str, Any]) -> None:
        parent, last = _parent(tree, self.key)
        if parent is not None:
            parent.setdefault(last, self.old)


@dataclass(frozen=True)
class Rewritten:
    """A part of the tree that has another form from `version` on."""

    version: int
    rewrite: Callable[[dict[str, Any]], None]

    def apply(self, tree: dict[str, Any]) -> None:
        self.rewrite(tree)


Migration = Renamed | Removed | DefaultChanged | Rewritten


def _name_the_logger(tree: dict[str, Any]) -> None:
    """Make the one logger of version 1, W&B's being local too, a map of loggers by name."""
    logger = tree.get("logger")
    if not isinstance(logger, dict) or "_target_" not in logger:
        return
    local = "lunaris.metrics.loggers.LocalLogger"
    loggers: dict[str, Any] = {"local": {"_target_": local}}
    if logger["_target_"] != local:
        name = "wandb" if "wandb" in logger["_target_"] else "custom"
        loggers[name] = logger
    tree["logger"] = loggers


def _name_the_experts_schema(tree: dict[str, Any]) -> None:
    """Name the schema of a custom class that was chosen over `moe=switch` and its like."""
    moe = tree.get("moe")
    if isinstance(moe, dict) and moe.keys() >= _EXPERTS_KEYS and "_schema_" not in moe:
        if not str(moe.get("_target_")).startswith("lunaris."):
            moe["_schema_"] = "lunaris.config.schema.moe.MoEConfig"


# Every key of the experts in version 1, which had no router to choose.
_EXPERTS_KEYS = {
    "_target_", "n_experts", "n_experts_per_token", "n_shared_experts", "capacity_factor",
    "balancing", "aux_loss_weight", "router_z_loss_weight", "bias_update_rate", "router_lr_scale",
    "normalize_gates", "expert_hidden_multiplier", "first_dense_layers",
}  # fmt: skip

MIGRATIONS: tuple[Migration, ...] = (
    Rewritten(2, _name_the_logger),
    Rewritten(2, _name_the_experts_schema),
)
VERSION = 2


def migrate(tree: dict[str, Any]) -> dict[str, Any]:
    """Bring the content of a config file to today's version, in place, and return it.

    Raises UserError for a version that is newer than this code, or no version at all.
    """
    version = tree.pop(VERSION_KEY, 1)
    if type(version) is not int or version < 1:
        raise UserError(f"{VERSION_KEY}={version}: must be a whole number from 1")
    if version > VERSION:
        raise UserError(
            f"{VERSION_KEY}={version}: written by a newer version of lunaris; this one reads up to "
            f"{VERSION}"
        )
    for row in MIGRATIONS:
        if row.version > version:
            row.apply(tree)
    return tree


_ABSENT = object()


def _parent(tree: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), last


def _pop(tree: dict[str, Any], key: str) -> Any:
    parent, last = _parent(tree, key)
    return _ABSENT if parent is None else parent.pop(last, _ABSENT)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value
