"""The schema of every config group: its keys, their types and their defaults. No torch.

A group that a person picks a class for carries `_target_`; `lunaris.run` instantiates it with the
group's other keys as keyword arguments. What one key can check alone is checked in
`__post_init__`, under its dotted name; what several groups decide together is in `validate`.
The schemas of the model's parts are in `components`, those of data in `sources`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from lunaris.config.components import (
    AdamWConfig,
    CosineConfig,
    DDPConfig,
    FSDPConfig,
    HSDPConfig,
    ModelConfig,
    MoEConfig,
    MuonConfig,
    NoMoEConfig,
    ScheduleConfig,
    SingleConfig,
    WSDConfig,
)
from lunaris.config.ranges import above_zero, one_of, within
from lunaris.config.sources import (
    HFDataConfig,
    ShardsDataConfig,
    StdlibDataConfig,
    SyntheticDataConfig,
    TextDataConfig,
)


@dataclass
class TrainerConfig:
    """The loop. `batch_size` is sequences a process a micro-step."""

    max_steps: int = 300
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    # Global gradient norm; null: no clipping.
    grad_clip: float | None = 1.0
    precision: str = "fp32"
    compile_model: bool = False
    activation_checkpointing: bool = False
    log_interval: int = 10
    # Null: evaluate at the last step only.
    eval_interval: int | None = 100
    # Validation batches of `batch_size` sequences a process; null: the whole validation part.
    eval_steps: int | None = 10
    # cpu, cuda, or null: cuda where there is one.
    device: str | None = None

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_interval",
                    "eval_interval", "eval_steps"):  # fmt: skip
            within(f"trainer.{key}", getattr(self, key), low=1)
        above_zero("trainer.grad_clip", self.grad_clip)
        one_of("trainer.precision", self.precision, ("bf16", "fp16", "fp32"))
        if self.device is not None:
            one_of("trainer.device", self.device, ("cpu", "cuda"))


@dataclass
class CheckpointConfig:
    """When to save and what to keep; the last step is always saved."""

    save_interval: int = 100
    # Newest checkpoints kept; null: all.
    keep_last: int | None = 3
    async_save: bool = False
    # At the end, also write the weights as one `model.pt`.
    consolidated: bool = False

    def __post_init__(self) -> None:
        within("checkpoint.save_interval", self.save_interval, low=1)
        within("checkpoint.keep_last", self.keep_last, low=1)


@dataclass
class LocalLoggerConfig:
    """The console and `metrics.jsonl`."""

    _target_: str = "lunaris.metrics.loggers.LocalLogger"


@dataclass
class WandbLoggerConfig:
    """The console, `metrics.jsonl` and Weights & Biases."""

    _target_: str = "lunaris.metrics.wandb_logger.WandbLogger"
    project: str = "lunaris"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "online"

    def __post_init__(self) -> None:
        one_of("logger.mode", self.mode, ("online", "offline", "disabled"))


@dataclass
class LaunchConfig:
    """What every way of starting processes has."""

    _target_: str = MISSING
    # Seconds after which a collective that did not complete ends the job, past the first step.
    collective_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        above_zero("launch.collective_timeout_s", self.collective_timeout_s)


@dataclass
class LocalLaunchConfig(LaunchConfig):
    """This machine."""

    _target_: str = "lunaris.launch.local.Local"
    processes: int = 1
    max_restarts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("launch.processes", self.processes, low=1)
        within("launch.max_restarts", self.max_restarts, low=0)


@dataclass
class SlurmLaunchConfig(LaunchConfig):
    """A SLURM cluster, through submitit; names of keys as in hydra-submitit-launcher."""

    _target_: str = "lunaris.launch.slurm.Slurm"
    # slurm, or local: submitit's local executor, to rehearse a submission on a laptop.
    cluster: str = "slurm"
    nodes: int = 1
    gpus_per_node: int = 0
    # Null: one task a GPU, or one task without GPUs.
    tasks_per_node: int | None = None
    cpus_per_task: int = 1
    mem_gb: float | None = None
    timeout_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # Shell lines run before the tasks start.
    setup: list[str] = field(default_factory=list)
    # Seconds before the limit at which the job is told to save and requeue.
    signal_delay_s: int = 120
    max_num_timeout: int = 1000
    array_parallelism: int = 256
    # Any further sbatch option: name -> value.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    # Block until the job has ended; a sweep then returns each point's best validation loss.
    wait: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("launch.cluster", self.cluster, ("slurm", "local"))
        for key in ("nodes", "tasks_per_node", "cpus_per_task", "timeout_min", "signal_delay_s",
                    "array_parallelism"):  # fmt: skip
            within(f"launch.{key}", getattr(self, key), low=1)
        within("launch.gpus_per_node", self.gpus_per_node, low=0)
        within("launch.max_num_timeout", self.max_num_timeout, low=0)
        above_zero("launch.mem_gb", self.mem_gb)


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
