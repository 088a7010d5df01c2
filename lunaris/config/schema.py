"""The schema of every config group: its keys, their types and their defaults. No torch.

A group that a person picks a class for carries `_target_`; `lunaris.run` instantiates it with the
group's other keys as keyword arguments. What one key can check alone is checked in
`__post_init__`, under its dotted name; what several groups decide together is in `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from lunaris.errors import UserError, did_you_mean


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(
            f"{key}={value}: allowed are {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
        )


def within(
    key: str, value: float | None, low: float | None = None, high: float | None = None
) -> None:
    """Raise UserError unless low <= value <= high; None (an unset optional value) passes."""
    if value is None:
        return
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{key}={value}: must be {allowed}")


def above_zero(key: str, value: float | None) -> None:
    """Raise UserError unless value > 0; None passes."""
    if value is not None and not value > 0:
        raise UserError(f"{key}={value}: must be greater than 0")


@dataclass
class ModelConfig:
    """The decoder. `vocab_size: null` takes the vocabulary of the data's manifest."""

    vocab_size: int | None = None
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    max_seq_len: int = 256
    rope_theta: float = 10000.0
    dropout: float = 0.0
    # Hidden width of a SwiGLU: 2/3 · multiplier · d_model, rounded up to `multiple_of`.
    ffn_hidden_multiplier: float = 4.0
    multiple_of: int = 32
    tie_embeddings: bool = True
    norm: str = "qk_reorder"

    def __post_init__(self) -> None:
        for key in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
            within(f"model.{key}", getattr(self, key), low=1)
        within("model.multiple_of", self.multiple_of, low=1)
        within("model.dropout", self.dropout, 0.0, 0.99)
        above_zero("model.rope_theta", self.rope_theta)
        above_zero("model.ffn_hidden_multiplier", self.ffn_hidden_multiplier)
        one_of("model.norm", self.norm, ("qk_reorder", "pre"))
        if self.d_model % self.n_heads:
            raise UserError(
                f"model.d_model={self.d_model}: must be divisible by model.n_heads={self.n_heads}"
            )
        if (self.d_model // self.n_heads) % 2:
            raise UserError(
                f"model.d_model={self.d_model}: d_model / n_heads = "
                f"{self.d_model // self.n_heads} must be even for rotary embeddings"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_kv_heads={self.n_kv_heads}: must divide model.n_heads={self.n_heads}"
            )


@dataclass
class NoMoEConfig:
    """A dense model: every feed-forward is one SwiGLU."""

    _target_: str = "lunaris.moe.factory.DenseFactory"


@dataclass
class MoEConfig:
    """A Mixture-of-Experts feed-forward in every layer from `first_dense_layers` on."""

    _target_: str = "lunaris.moe.factory.MoEFactory"
    n_experts: int = 8
    n_experts_per_token: int = 1
    n_shared_experts: int = 0
    # Tokens an expert takes of each sequence: ceil(factor · L · k / n_experts); null: dropless.
    capacity_factor: float | None = None
    balancing: str = "aux_loss"
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    bias_update_rate: float = 0.001
    router_lr_scale: float = 1.0
    # Divide the chosen gate probabilities by their sum; needs k > 1.
    normalize_gates: bool = False
    # Null: the model's ffn_hidden_multiplier.
    expert_hidden_multiplier: float | None = None
    first_dense_layers: int = 0

    def __post_init__(self) -> None:
        within("moe.n_experts", self.n_experts, low=1)
        within("moe.n_experts_per_token", self.n_experts_per_token, low=1)
        within("moe.n_shared_experts", self.n_shared_experts, low=0)
        within("moe.first_dense_layers", self.first_dense_layers, low=0)
        within("moe.aux_loss_weight", self.aux_loss_weight, low=0)
        within("moe.router_z_loss_weight", self.router_z_loss_weight, low=0)
        above_zero("moe.capacity_factor", self.capacity_factor)
        above_zero("moe.expert_hidden_multiplier", self.expert_hidden_multiplier)
        above_zero("moe.bias_update_rate", self.bias_update_rate)
        above_zero("moe.router_lr_scale", self.router_lr_scale)
        one_of("moe.balancing", self.balancing, ("aux_loss", "bias", "none"))
        if self.n_experts_per_token > self.n_experts:
            raise UserError(
                f"moe.n_experts_per_token={self.n_experts_per_token}: "
                f"must be at most moe.n_experts={self.n_experts}"
            )
        if self.normalize_gates and self.n_experts_per_token == 1:
            raise UserError(
                "moe.normalize_gates=true: needs moe.n_experts_per_token above 1; with one expert "
                "the gate is always 1 and the router gets no gradient"
            )


@dataclass
class DataConfig:
    """The keys that every kind of data has."""

    _target_: str = MISSING
    # Tokens of one document neither attend to nor predict those of another.
    document_masking: bool = False


@dataclass
class StdlibDataConfig(DataConfig):
    """The source text of the running Python's standard library; needs no network."""

    _target_: str = "lunaris.data.stdlib.StdlibData"
    # Null: a folder under the user's cache, named after what the shards depend on.
    dir: str | None = None
    vocab_size: int = 2048
    val_fraction: float = 0.05

    def __post_init__(self) -> None:
        within("data.vocab_size", self.vocab_size, 257, 2**32)
        within("data.val_fraction", self.val_fraction, 0.0, 0.9)


@dataclass
class ShardsDataConfig(DataConfig):
    """One or several folders of `.npy` token shards, with or without a manifest."""

    _target_: str = "lunaris.data.shards.ShardsData"
    # A folder, or a list of folders that are mixed.
    dir: Any = MISSING
    # Null: the folder's `val` part when a manifest names one, else `val_fraction` of the tokens.
    val_dir: Any = None
    # One weight a folder; null: in proportion to their tokens.
    weights: list[float] | None = None
    val_fraction: float = 0.01
    # Null: the manifest's, else the largest id + 1.
    vocab_size: int | None = None
    # Null: the manifest's; without one, needed for document_masking.
    eot_id: int | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        within("data.val_fraction", self.val_fraction, 0.0, 0.9)
        within("data.vocab_size", self.vocab_size, low=1)
        within("data.eot_id", self.eot_id, low=0)


@dataclass
class SyntheticDataConfig(DataConfig):
    """Tokens drawn from a seeded bigram table: for tests and for measuring speed."""

    _target_: str = "lunaris.data.synthetic.SyntheticData"
    vocab_size: int = 512
    n_tokens: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        within("data.vocab_size", self.vocab_size, 2, 2**32)
        within("data.n_tokens", self.n_tokens, low=2)


@dataclass
class PreparedDataConfig(DataConfig):
    """What `lunaris prepare` makes shards from, and how; training reads the shards in `dir`."""

    dir: str = MISSING
    # A tokenizer.json, a Hub name, or null: train byte-level BPE of `vocab_size` on a sample.
    tokenizer: str | None = None
    vocab_size: int = 32768
    sample_mb: int = 64
    shard_tokens: int = 100_000_000
    val_fraction: float = 0.001
    # Name -> weight; null: in proportion to the sources' sizes.
    weights: Any = None
    seed: int = 0
    processes: int | None = None
    on_error: str = "fail"
    verify: bool = False

    def __post_init__(self) -> None:
        within("data.vocab_size", self.vocab_size, 257, 2**32)
        within("data.sample_mb", self.sample_mb, low=1)
        within("data.shard_tokens", self.shard_tokens, low=1)
        within("data.val_fraction", self.val_fraction, 0.0, 0.9)
        within("data.processes", self.processes, low=1)
        one_of("data.on_error", self.on_error, ("fail", "skip"))


@dataclass
class TextDataConfig(PreparedDataConfig):
    """Plain text, JSONL or Parquet files, compressed or not."""

    _target_: str = "lunaris.data.text.TextData"
    # A list of globs, or a map of source name -> list of globs.
    files: Any = MISSING
    text_key: str = "text"


@dataclass
class HFDataConfig(PreparedDataConfig):
    """Datasets of the Hugging Face Hub, streamed; needs the extra `hf`."""

    _target_: str = "lunaris.data.hf.HFData"
    # "owner/name", or a map of source name -> {path, name, split, text_key}.
    datasets: Any = MISSING
    split: str = "train"
    text_key: str = "text"


@dataclass
class SingleConfig:
    """One process."""

    _target_: str = "lunaris.parallelism.single.Single"


@dataclass
class DDPConfig:
    """The model replicated in every process; gradients averaged."""

    _target_: str = "lunaris.parallelism.ddp.DDP"
    # Processes that share one set of experts; divides the world and moe.n_experts.
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        within("parallelism.expert_parallel", self.expert_parallel, low=1)


@dataclass
class FSDPConfig(DDPConfig):
    """Parameters, gradients and optimizer state sharded over all processes (ZeRO-3)."""

    _target_: str = "lunaris.parallelism.fsdp.FSDP"
    # Free a block's gathered parameters after its forward; false keeps them until its backward.
    reshard_after_forward: bool = True


@dataclass
class HSDPConfig(FSDPConfig):
    """Sharded within groups of `shard_size` processes, replicated across the groups."""

    _target_: str = "lunaris.parallelism.fsdp.HSDP"
    # Null: the processes of one node.
    shard_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        within("parallelism.shard_size", self.shard_size, low=1)


@dataclass
class AdamWConfig:
    """AdamW (arXiv 1711.05101); decay on matrices and stacked experts, not on norms."""

    _target_: str = "lunaris.optim.adamw.build_adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        above_zero("optimizer.learning_rate", self.learning_rate)
        within("optimizer.weight_decay", self.weight_decay, low=0)
        above_zero("optimizer.eps", self.eps)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserError(f"optimizer.betas={list(self.betas)}: each must be in [0, 1)")


@dataclass
class MuonConfig(AdamWConfig):
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and routers."""

    _target_: str = "lunaris.optim.muon.build_muon"
    momentum: float = 0.95
    ns_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        within("optimizer.momentum", self.momentum, 0.0, 0.9999)
        within("optimizer.ns_steps", self.ns_steps, low=1)


@dataclass
class ScheduleConfig:
    """Linear warm-up, then a constant rate."""

    _target_: str = "lunaris.optim.schedule.Constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        within("schedule.warmup_steps", self.warmup_steps, low=0)


@dataclass
class CosineConfig(ScheduleConfig):
    """Linear warm-up, then half a cosine down to `min_lr_ratio` of the peak."""

    _target_: str = "lunaris.optim.schedule.Cosine"
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        within("schedule.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)


@dataclass
class WSDConfig(CosineConfig):
    """Warm-up, stable, decay: the last `decay_fraction` of the steps fall linearly."""

    _target_: str = "lunaris.optim.schedule.WSD"
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        within("schedule.decay_fraction", self.decay_fraction, 0.0, 1.0)


@dataclass
class TrainerConfig:
    """The loop. `batch_size` is sequences a process a micro-step."""

    max_steps: int = 400
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
