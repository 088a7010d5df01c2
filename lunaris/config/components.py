"""The schemas of what a model is made of and how it is optimized and spread. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.ranges import above_zero, one_of, within
from lunaris.errors import UserError


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
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas={list(self.betas)}: must be a list of 2 numbers")
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
