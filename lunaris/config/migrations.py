"""How the config file of an older version becomes one of today. No torch.

A config file holds `config_version`; one without it is of version 1. Reading it applies, in order,
the rows of MIGRATIONS above its version; then a key that it lacks takes its default. A new key's
default must therefore keep the numbers of old runs; where it does not, `default_changed` gives
the old value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from lunaris.errors import UserError

VERSION_KEY = "config_version"


class Rewritten(NamedTuple):
    """A part of the tree that has another form from `version` on."""

    version: int
    rewrite: Callable[[dict[str, Any]], object]


def renamed(version: int, old: str, new: str) -> Rewritten:
    """Return the migration of a key that has another dotted name from `version` on."""

    def rewrite(tree: dict[str, Any]) -> None:
        parent, last = _parent(tree, old)
        if last in parent:
            *path, name = new.split(".")
            node = reduce(lambda node, part: node.setdefault(part, {}), path, tree)
            node[name] = parent.pop(last)

    return Rewritten(version, rewrite)


def removed(version: int, key: str) -> Rewritten:
    """Return the migration of a key that does not exist any more from `version` on."""
    return Rewritten(version, lambda tree: _parent(tree, key)[0].pop(key.rpartition(".")[2], None))


def default_changed(version: int, key: str, old: Any) -> Rewritten:
    """Return the migration of a key whose default is another; `old` is what older files meant."""

    def rewrite(tree: dict[str, Any]) -> None:
        parent, last = _parent(tree, key)
        parent.setdefault(last, old)

    return Rewritten(version, rewrite)


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


def _forget_the_attentions_schema(tree: dict[str, Any]) -> None:
    """Let a custom class that was chosen over `attention=gqa` get no keys, as gqa had none."""
    attention = tree.get("attention")
    if isinstance(attention, dict) and not str(attention.get("_target_")).startswith("lunaris."):
        if attention.get("_schema_") == "lunaris.config.schema.attention.GQAConfig":
            del attention["_schema_"]


_EXPERTS = "lunaris.moe.factory.MoEFactory"
# Every key of the experts in version 1, which had no router to choose.
_EXPERTS_KEYS = {
    "_target_", "n_experts", "n_experts_per_token", "n_shared_experts", "capacity_factor",
    "balancing", "aux_loss_weight", "router_z_loss_weight", "bias_update_rate", "router_lr_scale",
    "normalize_gates", "expert_hidden_multiplier", "first_dense_layers",
}  # fmt: skip


def _keep_the_scopes_of_sequences(tree: dict[str, Any]) -> None:
    """Keep what version 2 counted in each sequence: expert shares and capacity."""
    moe = tree.setdefault("moe", {"_target_": _EXPERTS})
    if not isinstance(moe, dict) or not _has_experts(moe):
        return
    if moe.get("balancing", "aux_loss") == "aux_loss":
        moe.setdefault("balance_scope", "sequence")
    data = tree.get("data")
    if moe.get("capacity_factor") is not None and isinstance(data, dict):
        if data.get("document_masking", False):
            moe.setdefault("capacity_scope", "sequence")


def _keep_the_width_of_experts(tree: dict[str, Any]) -> None:
    """Keep what null meant in version 3 for several experts a token: each as wide as dense."""
    moe = tree.get("moe")
    if not isinstance(moe, dict) or moe.get("_target_") != _EXPERTS:
        return
    one = (moe.get("n_experts_per_token", 1), moe.get("n_shared_experts", 0)) == (1, 0)
    if not one and moe.get("expert_hidden_multiplier") is None:
        model = tree.get("model")
        width = model.get("ffn_hidden_multiplier", 4.0) if isinstance(model, dict) else 4.0
        moe["expert_hidden_multiplier"] = width


def _keep_masks(tree: dict[str, Any]) -> None:
    """Keep the last bits of what version 4 computed by masks: documents and windows."""
    package = "lunaris.model.attention."
    attention = tree.setdefault("attention", {"_target_": f"{package}gqa.GQAFactory"})
    if isinstance(attention, dict) and str(attention.get("_target_")).startswith(package):
        if str(attention.get("_schema_", "lunaris.")).startswith("lunaris."):
            attention.setdefault("ranges", "masked")


def _keep_newton_schulz(tree: dict[str, Any]) -> None:
    """Keep the only iteration that Muon had in version 6, its number of steps and its rate."""
    optimizer = tree.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("_target_") == "lunaris.optim.muon.build_muon":
        optimizer.setdefault("orthogonalization", "newton_schulz")
        optimizer.setdefault("ns_steps", 5)
        optimizer.setdefault("learning_rate", 3e-3)


def migrate_identity(identity: dict[str, Any], version: int) -> None:
    """Bring what a sweep's manifest says of a point (dotted keys) to today's version, in place."""
    key = "moe.expert_hidden_multiplier"
    if version >= 4 or key not in identity:
        return
    tree: dict[str, Any] = {"moe": {}, "model": {}}
    for name, value in identity.items():
        group, _, last = name.partition(".")
        if group in tree:
            tree[group][last] = value
    _keep_the_width_of_experts(tree)
    identity[key] = tree["moe"]["expert_hidden_multiplier"]


def _has_experts(moe: dict[str, Any]) -> bool:
    schema = "lunaris.config.schema.moe.MoEConfig"
    return moe.get("_target_") == _EXPERTS or moe.get("_schema_") == schema


def _name_the_checkpointing(tree: dict[str, Any]) -> None:
    """Name the two kinds of activation checkpointing, which was on or off up to version 4."""
    trainer = tree.get("trainer")
    key = "activation_checkpointing"
    if isinstance(trainer, dict) and type(trainer.get(key)) is bool:
        trainer[key] = "full" if trainer[key] else "none"


MIGRATIONS = (
    Rewritten(2, _name_the_logger),
    Rewritten(2, _name_the_experts_schema),
    Rewritten(3, _keep_the_scopes_of_sequences),
    Rewritten(3, _forget_the_attentions_schema),
    Rewritten(4, _keep_the_width_of_experts),
    Rewritten(5, _name_the_checkpointing),
    Rewritten(5, _keep_masks),
    default_changed(6, "trainer.max_steps", 300),
    default_changed(6, "trainer.batch_size", 16),
    Rewritten(7, _keep_newton_schulz),
)
VERSION = 7


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
            row.rewrite(tree)
    return tree


def _parent(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the map that holds a dotted key, {} where the tree has none, and the key's name."""
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else {}), last
