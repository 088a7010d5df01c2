"""The whole config: its groups and the schema of every option. No torch.

A group that a person picks a class for carries `_target_`; `lunaris.run` instantiates it with the
group's other keys as keyword arguments. What one key can check alone is checked in
`__post_init__`, under its dotted name; what several groups decide together is in `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from lunaris.config.schema.checks import within
from lunaris.config.schema.data import (
    HFDataConfig,
    ShardsDataConfig,
    StdlibDataConfig,
    SyntheticDataConfig,
    TextDataConfig,
)
from lunaris.config.schema.launch import LocalLaunchConfig, SlurmLaunchConfig
from lunaris.config.schema.logger import LocalLoggerConfig, WandbLoggerConfig
from lunaris.config.schema.model import ModelConfig
from lunaris.config.schema.moe import MoEConfig, NoMoEConfig
from lunaris.config.schema.optimizer import AdamWConfig, MuonConfig
from lunaris.config.schema.parallelism import DDPConfig, FSDPConfig, HSDPConfig, SingleConfig
from lunaris.config.schema.schedule import CosineConfig, ScheduleConfig, WSDConfig
from lunaris.config.schema.trainer import CheckpointConfig, TrainerConfig


@dataclass
class Config:
    """The whole composed config. Groups with `_target_` hold one of several schemas."""

    # Null: derived from the overrides, so that different commands get different folders.
    name: str | None = None
    seed: int = 1337
    out_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: Any = MISSING
    data: Any = MISSING
    parallelism: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: Any = MISSING
    launch: Any = MISSING
    experiment: Any = None

    def __post_init__(self) -> None:
        within("seed", self.seed, 0, 2**63 - 1)


# group -> option -> schema; the one table that composition, validation and their messages read.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {o: ModelConfig for o in ("nano", "tiny", "small", "base", "large")},
    "moe": {"none": NoMoEConfig, "switch": MoEConfig, "top2": MoEConfig, "fine_grained": MoEConfig},
    "data": {
        "stdlib": StdlibDataConfig,
        "shards": ShardsDataConfig,
        "synthetic": SyntheticDataConfig,
        "text": TextDataConfig,
        "hf": HFDataConfig,
    },
    "parallelism": {
        "single": SingleConfig,
        "ddp": DDPConfig,
        "fsdp": FSDPConfig,
        "hsdp": HSDPConfig,
    },
    "optimizer": {"adamw": AdamWConfig, "muon": MuonConfig},
    "schedule": {"constant": ScheduleConfig, "cosine": CosineConfig, "wsd": WSDConfig},
    "trainer": {"default": TrainerConfig},
    "checkpoint": {"default": CheckpointConfig},
    "logger": {"local": LocalLoggerConfig, "wandb": WandbLoggerConfig},
    "launch": {"local": LocalLaunchConfig, "slurm": SlurmLaunchConfig},
}
