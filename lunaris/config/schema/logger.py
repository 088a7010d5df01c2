"""The schemas of the loggers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lunaris.config.schema.base import Component
from lunaris.config.schema.checks import one_of


@dataclass
class LoggerConfig(Component):
    """Where metrics go."""


@dataclass
class LocalLoggerConfig(LoggerConfig):
    """The console and `metrics.jsonl`."""

    _target_: str = "lunaris.metrics.loggers.LocalLogger"


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases."""

    _target_: str = "lunaris.metrics.wandb_logger.WandbLogger"
    project: str = "lunaris"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "online"

    def __post_init__(self) -> None:
        one_of("logger.wandb.mode", self.mode, ("online", "offline", "disabled"))
