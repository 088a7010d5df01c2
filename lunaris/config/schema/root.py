"""The whole config. No torch.

`Config` names the groups; a file next to this one holds each group's schemas. A key states the
limits of its value, `__post_init__` checks keys of one group against each other, and
`lunaris.config.validate` those of several groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lunaris.config.schema.attention import AttentionConfig, GQAConfig
from lunaris.config.schema.base import CHANGEABLE, FREE, Schema, component, free, key
from lunaris.config.schema.data import DataConfig, StdlibDataConfig
from lunaris.config.schema.launch import LaunchConfig, LocalLaunchConfig
from lunaris.config.schema.logger import LocalLoggerConfig, LoggerConfig
from lunaris.config.schema.model import ModelConfig
from lunaris.config.schema.moe import FeedForwardConfig, MoEConfig
from lunaris.config.schema.objective import NextTokenConfig, ObjectiveConfig
from lunaris.config.schema.optimizer import AdamWConfig, OptimizerConfig
from lunaris.config.schema.parallelism import ParallelismConfig, SingleConfig
from lunaris.config.schema.schedule import CosineConfig, ScheduleConfig
from lunaris.config.schema.trainer import CheckpointConfig, TrainerConfig


@dataclass
class Config(Schema):
    """Everything one run is made of."""

    # Null: derived from the overrides, so that different commands get different folders.
    name: str | None = free(None)
    # Of the weights, the order of the data and dropout.
    seed: int = key(1337, low=0, high=2**63 - 1)
    # The run's folder; of a sweep, the folder of its points.
    out_dir: str = free("runs/${name}")
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = component(AttentionConfig, GQAConfig)
    moe: FeedForwardConfig = component(FeedForwardConfig, MoEConfig)
    objective: ObjectiveConfig = component(ObjectiveConfig, NextTokenConfig)
    data: DataConfig = component(DataConfig, StdlibDataConfig, **CHANGEABLE)
    parallelism: ParallelismConfig = component(ParallelismConfig, SingleConfig, **FREE)
    optimizer: OptimizerConfig = component(OptimizerConfig, AdamWConfig)
    schedule: ScheduleConfig = component(ScheduleConfig, CosineConfig, **CHANGEABLE)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    # One logger per name.
    logger: dict[str, LoggerConfig] = component(LoggerConfig, LocalLoggerConfig, many=True, **FREE)
    launch: LaunchConfig = component(LaunchConfig, LocalLaunchConfig, **FREE)
    # The weights of a run, a checkpoint, a model.pt or a Hugging Face folder; null: fresh ones.
    init_from: str | None = None
    # Refuse weights that do not all fit, and another tokenizer.
    init_from_strict: bool = True
    # Take the rows that both vocabularies have.
    init_from_resize: bool = False
    # Of experts made of a dense feed-forward: relative noise on each copy.
    init_from_noise: float = key(0.0, low=0.0)
    # Of experts made of a dense feed-forward: the share of units drawn again (arXiv 2502.19261).
    init_from_drop: float = key(0.0, low=0.0, high=0.99)
    # The experiment that was chosen; set by the command line.
    experiment: str | None = free(None)
