"""Checks across keys and groups, on the login node, before anything starts. No torch."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from lunaris.config.identity import tasks_per_node, world_size
from lunaris.config.schema.data import (
    PreparedDataConfig,
    ShardsDataConfig,
    StdlibDataConfig,
    SyntheticDataConfig,
)
from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.moe import MoEConfig
from lunaris.config.schema.parallelism import DDPConfig, HSDPConfig, SingleConfig
from lunaris.config.schema.schedule import WSDConfig
from lunaris.config.structure import check_structure
from lunaris.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def validate(cfg: DictConfig, *, check_data: bool = True) -> None:
    """Raise UserError for the first fault of a composed config: one key's, then several keys'.

    `check_data=False` skips what reads the shards, which `lunaris prepare` has yet to make.
    """
    check_structure(cfg)
    _check_names(cfg)
    _check_moe(cfg)
    _check_schedule(cfg)
    _check_launch(cfg)
    _check_parallelism(cfg)
    _check_vocabulary(cfg)
    if check_data:
        _check_shards(cfg)


def _is(cfg: DictConfig, group: str, schema: type) -> bool:
    kind = OmegaConf.get_type(cfg[group])
    return isinstance(kind, type) and issubclass(kind, schema)


def _check_names(cfg: DictConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=+,@-]{0,199}", str(cfg.name)):
        raise UserError(
            f"name={cfg.name}: must be 1 to 200 letters, digits and ._=+,@- and begin with a "
            "letter or a digit"
        )
    if not str(cfg.out_dir).strip():
        raise UserError("out_dir=: must be the path of a folder")


def _check_moe(cfg: DictConfig) -> None:
    if _is(cfg, "moe", MoEConfig) and cfg.moe.first_dense_layers >= cfg.model.n_layers:
        raise UserError(
            f"moe.first_dense_layers={cfg.moe.first_dense_layers}: must be below "
            f"model.n_layers={cfg.model.n_layers}; a model without experts is moe=none"
        )


def _check_schedule(cfg: DictConfig) -> None:
    steps, warmup = cfg.trainer.max_steps, cfg.schedule.get("warmup_steps", 0)
    if warmup > steps:
        raise UserError(
            f"schedule.warmup_steps={warmup}: must be at most trainer.max_steps={steps}"
        )
    if _is(cfg, "schedule", WSDConfig):
        decay = round(steps * cfg.schedule.decay_fraction)
        if warmup + decay > steps:
            raise UserError(
                f"schedule.warmup_steps={warmup}: must leave room for the {decay} steps of decay "
                f"(schedule.decay_fraction={cfg.schedule.decay_fraction}) in "
                f"trainer.max_steps={steps}"
            )


def _check_launch(cfg: DictConfig) -> None:
    if not _is(cfg, "launch", SlurmLaunchConfig):
        return
    launch = cfg.launch
    if launch.signal_delay_s >= 60 * launch.timeout_min:
        raise UserError(
            f"launch.signal_delay_s={launch.signal_delay_s}: must be below the "
            f"{60 * launch.timeout_min} seconds of launch.timeout_min={launch.timeout_min}"
        )
    if 0 < launch.gpus_per_node < tasks_per_node(launch):
        raise UserError(
            f"launch.tasks_per_node={launch.tasks_per_node}: must be at most "
            f"launch.gpus_per_node={launch.gpus_per_node}; a process takes a GPU of its own"
        )


def _check_parallelism(cfg: DictConfig) -> None:
    world, said = world_size(cfg), _world_in_words(cfg)
    if _is(cfg, "parallelism", SingleConfig) and world > 1:
        raise UserError(
            f"parallelism=single: one process, but {said}; choose parallelism=ddp, fsdp or hsdp"
        )
    if _is(cfg, "parallelism", DDPConfig):
        _check_expert_parallel(cfg, world, said)
    if _is(cfg, "parallelism", HSDPConfig):
        size = cfg.parallelism.shard_size
        if size is not None and world % size:
            raise UserError(f"parallelism.shard_size={size}: must divide the world: {said}")
        size, degree = size or _processes_of_a_node(cfg), cfg.parallelism.expert_parallel
        if size % degree:
            raise UserError(
                f"parallelism.expert_parallel={degree}: must divide parallelism.shard_size={size}"
            )


def _check_expert_parallel(cfg: DictConfig, world: int, said: str) -> None:
    degree = cfg.parallelism.expert_parallel
    if degree == 1:
        return
    key = f"parallelism.expert_parallel={degree}"
    if world % degree:
        raise UserError(f"{key}: must divide the world: {said}")
    if not _is(cfg, "moe", MoEConfig):
        if "n_experts" not in cfg.moe:
            raise UserError(f"{key}: must be 1 with moe=none, there are no experts to share out")
        return
    if cfg.moe.n_experts % degree:
        raise UserError(f"{key}: must divide moe.n_experts={cfg.moe.n_experts}")


def _processes_of_a_node(cfg: DictConfig) -> int:
    if "RANK" in os.environ:
        return int(os.environ.get("LOCAL_WORLD_SIZE", world_size(cfg)))
    return tasks_per_node(cfg.launch) if "nodes" in cfg.launch else world_size(cfg)


def _world_in_words(cfg: DictConfig) -> str:
    if "RANK" in os.environ:
        return f"torchrun started {world_size(cfg)} processes"
    if "nodes" in cfg.launch:
        tasks = tasks_per_node(cfg.launch)
        return f"launch.nodes={cfg.launch.nodes} × {tasks} processes = {world_size(cfg)}"
    return f"launch.processes={world_size(cfg)}"


def _check_vocabulary(cfg: DictConfig) -> None:
    """Check what the data will hold, where its config says so, against the model."""
    if not (_is(cfg, "data", StdlibDataConfig) or _is(cfg, "data", SyntheticDataConfig)):
        return
    needed, model = cfg.data.vocab_size, cfg.model.vocab_size
    if model is not None and model < needed:
        raise UserError(
            f"model.vocab_size={model}: must be at least data.vocab_size={needed}; "
            "null takes that of the data"
        )
    if _is(cfg, "data", SyntheticDataConfig):
        _check_length(cfg, "data.n_tokens", cfg.data.n_tokens)


def _check_shards(cfg: DictConfig) -> None:
    """Check the folders of shards that the data names, against each other and the model."""
    from lunaris.data.folders import inspect_folders, inspect_prepared

    if _is(cfg, "data", PreparedDataConfig):
        found = inspect_prepared(cfg.data.dir, document_masking=cfg.data.document_masking)
    elif _is(cfg, "data", ShardsDataConfig):
        found = inspect_folders(cfg.data)
    else:
        return
    found.check_vocab_size("model.vocab_size", cfg.model.vocab_size)
    for info in found.train:
        _check_length(cfg, f"data.dir={info.path}", info.n_tokens)


def _check_length(cfg: DictConfig, key: str, n_tokens: int) -> None:
    length = cfg.model.max_seq_len
    if n_tokens < length + 1:
        raise UserError(
            f"model.max_seq_len={length}: one sequence needs {length + 1} tokens, "
            f"but {key} has {n_tokens}"
        )
