"""The checks of a composed config, on the login node, before anything starts. No torch."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lunaris.config.identity import world_size
from lunaris.config.instantiate import locate_class
from lunaris.config.schema.attention import MLAConfig
from lunaris.config.schema.base import Component
from lunaris.config.schema.data import (
    PreparedDataConfig,
    ShardsDataConfig,
    StdlibDataConfig,
    SyntheticDataConfig,
)
from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.moe import MoEConfig
from lunaris.config.schema.objective import MultiTokenConfig
from lunaris.config.schema.parallelism import DDPConfig, FSDPConfig, HSDPConfig, SingleConfig
from lunaris.config.schema.root import Config
from lunaris.config.schema.schedule import ConstantConfig, WSDConfig
from lunaris.errors import UserError, not_installed

# The methods of each group's classes, and where they are described.
METHODS = {
    "attention": (("__call__",), "lunaris.model.attention.base.AttentionFactory"),
    "moe": (("__call__",), "lunaris.model.feed_forward.FeedForwardFactory"),
    "moe.router": (("__call__",), "lunaris.moe.router.base.RouterFactory"),
    "data": (("ensure_ready", "train", "val"), "lunaris.data.base.Data"),
    "objective": (
        ("__call__", "predictors", "logits", "count_targets", "targets_vary"),
        "lunaris.objective.base.Objective",
    ),
    "schedule": (("__call__",), "lunaris.optim.schedule.Schedule"),
    "parallelism": (
        ("wrap", "micro_step", "sum", "vote", "agree", "gather"),
        "lunaris.parallelism.base.Parallelism",
    ),
    "logger": (
        ("start", "tick", "log", "message", "flush", "finish"), "lunaris.metrics.loggers.Logger",
    ),
    "launch": (("submit",), "lunaris.launch.local.Local"),
}  # fmt: skip
_EXAMPLES = {"dir": "FOLDER", "files": "'[corpus/*.jsonl]'", "datasets": "OWNER/NAME"}


def validate(cfg: Config, *, check_data: bool = True) -> None:
    """Raise UserError for the first conflict between keys of several groups.

    `check_data=False` skips what reads the shards, which `lunaris prepare` has yet to make.
    """
    _check_names(cfg)
    _check_classes(cfg)
    _check_extras(cfg)
    _check_attention(cfg)
    _check_moe(cfg)
    _check_objective(cfg)
    _check_schedule(cfg)
    _check_launch(cfg)
    _check_parallelism(cfg)
    _check_vocabulary(cfg)
    if check_data:
        _check_shards(cfg)


def check_values(tree: Any, *, missing: bool = False) -> None:
    """Raise UserError for an interpolation that cannot be resolved and for a missing value.

    missing: allow missing values.
    """
    # Plain values are looked at, because each look at a node of OmegaConf's costs far more.
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    _check_plain(tree, plain, [], missing=missing)


def _check_plain(tree: Any, plain: Any, place: list[str | int], *, missing: bool) -> None:
    """Check the values below `plain`, which are those of the node at `place` in the tree."""
    for key, value in enumerate(plain) if isinstance(plain, list) else plain.items():
        here = [*place, key]
        if isinstance(value, dict | list):
            _check_plain(tree, value, here, missing=missing)
        elif isinstance(value, str):
            _check_text(tree, value, here, missing=missing)
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{_written(here)}={value}: must be below 2**63")


def _check_text(tree: Any, text: str, place: list[str | int], *, missing: bool) -> None:
    if text == MISSING and not missing:
        here = _written(place)
        example = _EXAMPLES.get(here.rpartition(".")[2], "VALUE")
        raise UserError(f"{here}: must be given, it has no default; write {here}={example}")
    if "${" not in text:
        return
    try:
        value = functools.reduce(lambda node, key: node[key], place, tree)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{_written(place)}={text}: cannot be resolved: {reason}") from error
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{_written(place)}={value}: must be below 2**63")


def _written(place: list[str | int]) -> str:
    """Return a place in the tree as a person writes it: `data.files[0]`."""
    words = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in place]
    return "".join(words).lstrip(".")


def _check_classes(cfg: Config) -> None:
    """Import the custom classes that the config names, as training will. Raises UserError."""
    parts = vars(cfg) | {f"logger.{name}": logger for name, logger in cfg.logger.items()}
    for key, part in list(parts.items()):
        if isinstance(part, Component):
            parts |= {f"{key}.{name}": value for name, value in vars(part).items()}
    for key, part in parts.items():
        if is_custom(part):
            _check_methods(key, part._target_, locate_class(key, part))


def is_custom(part: object) -> bool:
    """Return whether a part of a config is a component whose class is not of this package."""
    return isinstance(part, Component) and not part._target_.startswith("lunaris.")


def _check_methods(key: str, target: str, made: Any) -> None:
    """Raise UserError where a custom class lacks a method that every class of its group needs.

    What a function returns is seen when the run is built.
    """
    group = "logger" if key.startswith("logger.") else key
    names, where = METHODS.get(group, ((), ""))
    if not isinstance(made, type):
        return
    for name in names:
        # Every class is callable; its objects are if a class that it derives from says so.
        if not any(name in vars(kind) for kind in made.__mro__):
            raise UserError(
                f"{key}._target_={target}: has no method {name}; {where} says what it takes and "
                "returns"
            )


def _check_extras(cfg: Config) -> None:
    """Raise UserError for a logger whose package, an extra of this one, is not installed."""
    for name, logger in cfg.logger.items():
        if logger._needs_ and importlib.util.find_spec(logger._needs_) is None:
            raise UserError(not_installed(logger._needs_, f"logger={name}", logger._needs_))


def _check_names(cfg: Config) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=+,@-]{0,199}", str(cfg.name)):
        raise UserError(
            f"name={cfg.name}: must be 1 to 200 letters, digits and ._=+,@- and begin with a "
            "letter or a digit"
        )
    if not str(cfg.out_dir).strip():
        raise UserError("out_dir=: must be the path of a folder")


def _check_attention(cfg: Config) -> None:
    """Check that the keys of `model` say what latent attention computes."""
    model = cfg.model
    if not isinstance(cfg.attention, MLAConfig):
        return
    _check_latent_widths(cfg, cfg.attention)
    wanted = {"norm": "pre", "n_kv_heads": model.n_heads}
    wrong = [
        f"model.{key}={getattr(model, key)}" for key in wanted if getattr(model, key) != wanted[key]
    ]
    if wrong:
        raise UserError(
            f"{' and '.join(wrong)}: attention=mla normalises its latents, not queries and keys, "
            "and every head has its own keys and values; write "
            f"model.norm=pre model.n_kv_heads={model.n_heads}"
        )


def _check_latent_widths(cfg: Config, attention: MLAConfig) -> None:
    """Check that the widths of latent attention grow with the model, as mup's rates assume."""
    if cfg.model.parametrization == "standard":
        return
    widths = {f"attention.{name}": value for name, value in attention.widths().items()}
    widths["model.mup_base_head_width"] = cfg.model.mup_base_head_width
    for name, value in widths.items():
        if value is not None:
            raise UserError(
                f"{name}={value}: must be null with attention=mla and model.parametrization=mup, "
                "whose rates assume that the widths of latent attention grow with model.d_model"
            )


def _check_moe(cfg: Config) -> None:
    if isinstance(cfg.moe, MoEConfig) and cfg.moe.first_dense_layers >= cfg.model.n_layers:
        raise UserError(
            f"moe.first_dense_layers={cfg.moe.first_dense_layers}: must be below "
            f"model.n_layers={cfg.model.n_layers}; a model without experts is moe=none"
        )


def _check_objective(cfg: Config) -> None:
    objective = cfg.objective
    if isinstance(objective, MultiTokenConfig) and objective.depth >= cfg.model.max_seq_len:
        raise UserError(
            f"objective.depth={objective.depth}: must be below "
            f"model.max_seq_len={cfg.model.max_seq_len}, for no position has so many later tokens"
        )


def _check_schedule(cfg: Config) -> None:
    if not isinstance(cfg.schedule, ConstantConfig):
        return
    steps, warmup = cfg.trainer.max_steps, cfg.schedule.warmup_steps
    if warmup > steps:
        raise UserError(
            f"schedule.warmup_steps={warmup}: must be at most trainer.max_steps={steps}"
        )
    if isinstance(cfg.schedule, WSDConfig):
        decay = round(steps * cfg.schedule.decay_fraction)
        if warmup + decay > steps:
            raise UserError(
                f"schedule.warmup_steps={warmup}: must leave room for the {decay} steps of decay "
                f"(schedule.decay_fraction={cfg.schedule.decay_fraction}) in "
                f"trainer.max_steps={steps}"
            )


def _check_launch(cfg: Config) -> None:
    launch = cfg.launch
    if not isinstance(launch, SlurmLaunchConfig):
        return
    if launch.signal_delay_s >= 60 * launch.timeout_min:
        raise UserError(
            f"launch.signal_delay_s={launch.signal_delay_s}: must be below the "
            f"{60 * launch.timeout_min} seconds of launch.timeout_min={launch.timeout_min}"
        )
    if 0 < launch.gpus_per_node < launch.processes_per_node():
        raise UserError(
            f"launch.tasks_per_node={launch.tasks_per_node}: must be at most "
            f"launch.gpus_per_node={launch.gpus_per_node}; each process takes one GPU"
        )


def _check_parallelism(cfg: Config) -> None:
    world, said, parallelism = world_size(cfg), _world_in_words(cfg), cfg.parallelism
    if isinstance(parallelism, SingleConfig) and world > 1:
        raise UserError(
            f"parallelism=single: one process, but {said}; choose parallelism=auto, ddp, fsdp or "
            "hsdp"
        )
    if isinstance(parallelism, DDPConfig):
        _check_expert_parallel(cfg, parallelism.expert_parallel, world, said)
    if isinstance(parallelism, HSDPConfig):
        size = parallelism.shard_size
        if size is not None and world % size:
            raise UserError(f"parallelism.shard_size={size}: must divide the world: {said}")
        if size is None and "RANK" in os.environ:
            size = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        size, degree = size or cfg.launch.processes_per_node(), parallelism.expert_parallel
        if size % degree:
            raise UserError(
                f"parallelism.expert_parallel={degree}: must divide parallelism.shard_size={size}"
            )
        world = size
    if isinstance(parallelism, FSDPConfig) and parallelism.expert_parallel > 1:
        _check_expert_shards(cfg, parallelism.expert_parallel, world)


def _check_expert_shards(cfg: Config, degree: int, replica: int) -> None:
    """Raise UserError where no width of an expert divides among the processes that share it.

    Its first dimension is that of the experts, which are sharded already. replica: processes that
    share a model.
    """
    if not isinstance(cfg.moe, MoEConfig):
        return
    shards, hidden = replica // degree, cfg.moe.expert_width(cfg.model)
    if cfg.model.d_model % shards and hidden % shards:
        raise UserError(
            f"parallelism.expert_parallel={degree}: {shards} processes share each expert, and "
            f"{shards} divides neither model.d_model={cfg.model.d_model} nor the experts' width of "
            f"{hidden}"
        )


def _check_expert_parallel(cfg: Config, degree: int, world: int, said: str) -> None:
    if degree == 1:
        return
    key = f"parallelism.expert_parallel={degree}"
    if world % degree:
        raise UserError(f"{key}: must divide the world: {said}")
    if not isinstance(cfg.moe, MoEConfig):
        if not hasattr(cfg.moe, "n_experts"):
            raise UserError(f"{key}: must be 1 with moe=none, which has no experts to shard")
        return
    if cfg.moe.n_experts % degree:
        raise UserError(f"{key}: must divide moe.n_experts={cfg.moe.n_experts}")


def _world_in_words(cfg: Config) -> str:
    launch, world = cfg.launch, world_size(cfg)
    if "RANK" in os.environ:
        return f"torchrun started {world} processes"
    if isinstance(launch, SlurmLaunchConfig):
        per_node = launch.processes_per_node()
        return f"launch.nodes={launch.nodes} × {per_node} processes = {world}"
    return f"launch.processes={world}"


def _check_vocabulary(cfg: Config) -> None:
    """Check what the data will hold, where its config says so, against the model."""
    data, model = cfg.data, cfg.model.vocab_size
    if not isinstance(data, StdlibDataConfig | SyntheticDataConfig):
        return
    if model is not None and model < data.vocab_size:
        raise UserError(
            f"model.vocab_size={model}: must be at least data.vocab_size={data.vocab_size}; "
            "null takes that of the data"
        )
    if isinstance(data, SyntheticDataConfig):
        _check_length(cfg, "data.n_tokens", data.n_tokens)


def _check_shards(cfg: Config) -> None:
    """Check the folders of shards that the data names, against each other and the model."""
    from lunaris.data.folders import inspect_folders, inspect_prepared

    data = cfg.data
    if data_comes_later(cfg):
        return
    if isinstance(data, PreparedDataConfig):
        found = inspect_prepared(data.dir, document_masking=data.document_masking)
    elif isinstance(data, ShardsDataConfig):
        found = inspect_folders(data)
    else:
        return
    found.check_vocab_size("model.vocab_size", cfg.model.vocab_size)
    for info in found.train:
        _check_length(cfg, f"data.dir={info.path}", info.n_tokens)


def data_comes_later(cfg: Config) -> bool:
    """Return whether jobs have yet to prepare some of the data, for which the run's job waits.

    The job then checks whether they fit.
    """
    if not isinstance(cfg.launch, SlurmLaunchConfig):
        return False
    awaited = {Path(folder).resolve() for folder in cfg.launch.awaited()}
    given = getattr(cfg.data, "dir", None)
    folders = [Path(str(each)) for each in (given if isinstance(given, list) else [given])]
    return any(f.resolve() in awaited and not (f / "manifest.json").is_file() for f in folders)


def _check_length(cfg: Config, key: str, n_tokens: int) -> None:
    length = cfg.model.max_seq_len
    if n_tokens < length + 1:
        raise UserError(
            f"model.max_seq_len={length}: one sequence needs {length + 1} tokens, "
            f"but {key} has {n_tokens}"
        )
