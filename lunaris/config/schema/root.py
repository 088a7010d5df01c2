"""The whole config. No torch.

`Config` names the groups; a file next to this one holds each group's schemas. What one key can
check alone is checked in `__post_init__`, under its dotted name; what several groups decide
together is in `lunaris.config.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lunaris.config.schema.attention import AttentionConfig, GQAConfig
from lunaris.config.schema.base import FREE, component, free
from lunaris.config.schema.checks import within
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
class Config:
    """Everything one run is made of."""

    # Null: derived from the overrides, so that different commands get different folders.
    name: str | None = free(None)
    seed: int = 1337
    out_dir: str = free("runs/${name}")
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = component(AttentionConfig, GQAConfig)
    moe: FeedForwardConfig = component(FeedForwardConfig, MoEConfig)
    objective: ObjectiveConfig = component(ObjectiveConfig, NextTokenConfig)
    data: DataConfig = component(DataConfig, StdlibDataConfig)
    parallelism: ParallelismConfig = component(ParallelismConfig, SingleConfig, **FREE)
    optimizer: OptimizerConfig = component(OptimizerConfig, AdamWConfig)
    schedule: ScheduleConfig = component(ScheduleConfig, CosineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = free(factory=CheckpointConfig)
    # One logger per name.
    logger: dict[str, LoggerConfig] = component(LoggerConfig, LocalLoggerConfig, many=True, **FREE)
    launch: LaunchConfig = component(LaunchConfig, LocalLaunchConfig, **FREE)
    experiment: str | None = free(None)

    def __post_init__(self) -> None:
        within("seed", self.seed, 0, 2**63 - 1)
