"""The schemas of the loggers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lunaris.config.schema.base import Component, key


@dataclass
class LoggerConfig(Component):
    """Where metrics go."""

    _group_ = "logger"
    # The package that it needs, which is also the name of the extra that installs it.
    _needs_: ClassVar[str] = ""


@dataclass
class LocalLoggerConfig(LoggerConfig):
    """The console and `metrics.jsonl`."""

    _target_: str = "lunaris.metrics.loggers.LocalLogger"


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases."""

    _group_ = "logger.wandb"
    _target_: str = "lunaris.metrics.wandb_logger.WandbLogger"
    project: str = "lunaris"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = key("online", allowed=("online", "offline", "disabled"))


@dataclass
class TensorBoardLoggerConfig(LoggerConfig):
    """TensorBoard's event files in the run's folder."""

    _group_ = "logger.tensorboard"
    _needs_ = "tensorboard"
    _target_: str = "lunaris.metrics.tensorboard_logger.TensorBoardLogger"


@dataclass
class TrackioLoggerConfig(LoggerConfig):
    """A local Trackio database."""

    _group_ = "logger.trackio"
    _needs_ = "trackio"
    _target_: str = "lunaris.metrics.trackio_logger.TrackioLogger"
    project: str = "lunaris"
    group: str | None = None
