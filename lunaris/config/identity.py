"""How many processes a config asks for, and what follows from it. No torch."""

from __future__ import annotations

import os
from typing import Any

# Keys that change where, how fast or how visibly a run goes, but not its numbers: a run's folder
# may be continued with other values of these.
_FREE_GROUPS = ("name", "out_dir", "experiment", "launch", "logger", "checkpoint", "parallelism")
_FREE_TRAINER = (
    "log_interval",
    "eval_interval",
    "eval_steps",
    "compile_model",
    "activation_checkpointing",
    "device",
    # Only their product with the number of processes counts: see `global_batch`.
    "batch_size",
    "gradient_accumulation_steps",
)
_FREE_DATA = ("verify", "processes", "on_error")


def world_size(cfg: Any) -> int:
    """Return the number of processes that will train: torchrun's, or what `launch` asks for."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return requested_world_size(cfg)


def requested_world_size(cfg: Any) -> int:
    """Return the number of processes that the `launch` group of a config asks for."""
    launch = cfg.launch
    if "nodes" in launch:
        return launch.nodes * tasks_per_node(launch)
    return launch.get("processes", 1)


def tasks_per_node(launch: Any) -> int:
    """Return the tasks of one node: as given, else one a GPU, else one."""
    return launch.tasks_per_node or launch.gpus_per_node or 1


def identity(cfg: Any) -> dict[str, Any]:
    """Return the keys of a composed config that decide a run's numbers, flat and dotted.

    Batch size, accumulation and processes count only by their product, `global_batch` (sequences
    an optimizer step), since a run may go on at another world size.
    """
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    for key in _FREE_GROUPS:
        tree.pop(key, None)
    for key in _FREE_TRAINER:
        tree["trainer"].pop(key, None)
    for key in _FREE_DATA:
        tree["data"].pop(key, None)
    trainer = cfg.trainer
    flat = _flatten(tree)
    flat["global_batch"] = (
        trainer.batch_size * trainer.gradient_accumulation_steps * requested_world_size(cfg)
    )
    return flat


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return "key: old → new" for every key in which two identities differ."""
    missing = object()
    rows = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, missing), new.get(key, missing)
        if a != b:
            shown = ["(absent)" if v is missing else v for v in (a, b)]
            rows.append(f"{key}: {shown[0]} → {shown[1]}")
    return rows


def _flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
