"""The schemas of the loggers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lunaris.config.schema.base import Component, key
from lunaris.errors import UserError

# The most characters of a tag that W&B takes.
WANDB_TAG_LENGTH = 64


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
    # The project. Null here, in entity, group, job_type or mode: W&B's environment variables
    # count (WANDB_PROJECT, WANDB_MODE, …).
    project: str | None = None
    # The user or team.
    entity: str | None = None
    # Runs that W&B shows together; null: in a sweep, its name.
    group: str | None = None
    # What W&B groups runs by within a group; null: in a sweep, `sweep`.
    job_type: str | None = None
    # Texts that W&B filters by; a sweep adds what differs between its points.
    tags: list[str] = field(default_factory=list)
    # Null: WANDB_MODE, else online.
    mode: str | None = key(None, allowed=("online", "offline", "disabled"))
    # Seconds in which W&B must have started, in the background.
    init_timeout_s: float = key(60.0, above=0, at_most=3600)
    # Seconds in which W&B must have finished at the run's end.
    finish_timeout_s: float = key(60.0, low=0, at_most=86400)

    def __post_init__(self) -> None:
        super().__post_init__()
        for tag in self.tags:
            if not 1 <= len(str(tag)) <= WANDB_TAG_LENGTH:
                raise UserError(
                    f"logger.wandb.tags={tag}: a tag must have 1 to {WANDB_TAG_LENGTH} characters"
                )
        for name in ("project", "entity", "group", "job_type"):
            value = getattr(self, name)
            if value is not None and not 1 <= len(value) <= 128:
                raise UserError(f"logger.wandb.{name}={value}: must have 1 to 128 characters")


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
    # The name of the project.
    project: str = "lunaris"
    # Runs that belong together.
    group: str | None = None
