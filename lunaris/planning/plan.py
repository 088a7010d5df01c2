"""A plan: everything that a config would cost, in one object. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lunaris.config.identity import world_size
from lunaris.config.schema.data import PreparedDataConfig, ShardsDataConfig, SyntheticDataConfig
from lunaris.config.schema.launch import SlurmLaunchConfig
from lunaris.config.schema.moe import MoEConfig, NoMoEConfig
from lunaris.config.schema.parallelism import FSDPConfig
from lunaris.config.schema.root import Config
from lunaris.devices import Device
from lunaris.errors import UserError
from lunaris.planning.costs import Traffic, checkpoint_bytes, traffic
from lunaris.planning.memory import GPU_RESERVE, Memory, memory_of
from lunaris.planning.parameters import active_parameters, flops_per_token, model_parameters
from lunaris.planning.sharding import Layout, layout_of

# The share of a GPU's peak FLOP/s that a run is assumed to reach where the person says none.
DEFAULT_MFU = 0.35


@dataclass(frozen=True)
class Plan:
    """What a config would cost.

    parts: parameters by part of the model. dense_twin: the parameters of the model with moe=none,
    None for a model that is dense. flops: FLOPs a token, forward and backward.
    data_tokens: tokens of the training data, None where they are not known yet. memory: of the
    fullest process. checkpoint: bytes of one. traffic: of one process and step.
    """

    cfg: Config
    processes: int
    vocab_size: int
    parts: dict[str, int]
    active: int
    dense_twin: int | None
    flops: float
    data_tokens: int | None
    memory: Memory
    checkpoint: int
    traffic: Traffic

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(self.parts.values())

    @property
    def sequences(self) -> int:
        """Sequences of a step over all processes."""
        trainer = self.cfg.trainer
        return trainer.batch_size * trainer.gradient_accumulation_steps * self.processes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all processes."""
        return self.sequences * self.cfg.model.max_seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.tokens_per_step * self.cfg.trainer.max_steps

    @property
    def epochs(self) -> float | None:
        """How often the training data is read, or None where its size is not known."""
        return self.tokens / self.data_tokens if self.data_tokens else None

    def seconds(self, device: Device, mfu: float) -> float:
        """Return the time of training on `device`s at a share `mfu` of their peak."""
        return self.flops * self.tokens / (device.flops * mfu * self.processes)

    def needed(self, *, gpu: bool) -> int:
        """Return the bytes that a process takes at its peak; on a GPU with what it reserves."""
        return self.memory.peak + (GPU_RESERVE if gpu else 0)


def make_plan(cfg: Config, *, gpu: bool, device: Device | None = None) -> Plan:
    """Return the plan of a config.

    gpu: on GPUs, else on CPUs. device: which GPU; one that is not known is taken to have a kernel
    for products of several experts. Raises UserError for a custom class, whose parameters are not
    known, and for a mesh that does not divide the processes.
    """
    precision = cfg.trainer.likely_precision(gpu=gpu)
    cfg = replace(cfg, trainer=replace(cfg.trainer, precision=precision))
    vocab_size, data_tokens = corpus(cfg)
    parameters = model_parameters(cfg, vocab_size)
    layout: Layout = layout_of(cfg)
    # As in `lunaris.moe.experts.choose_product`.
    grouped = cfg.trainer.precision == "bf16" and (device is None or device.grouped_mm)
    memory = memory_of(cfg, parameters, layout, gpu=gpu, padded=gpu and not grouped)
    parts: dict[str, int] = {}
    for parameter in parameters:
        parts[parameter.part] = parts.get(parameter.part, 0) + parameter.numel
    return Plan(
        cfg=cfg,
        processes=world_size(cfg),
        vocab_size=vocab_size,
        parts=parts,
        active=active_parameters(cfg, parameters),
        dense_twin=_dense_twin(cfg, vocab_size),
        flops=flops_per_token(cfg, parameters),
        data_tokens=data_tokens,
        memory=memory,
        checkpoint=checkpoint_bytes(parameters, memory.optimizer, layout),
        traffic=traffic(cfg, parameters, layout),
    )


def _dense_twin(cfg: Config, vocab_size: int) -> int | None:
    if not isinstance(cfg.moe, MoEConfig):
        return None
    dense = model_parameters(replace(cfg, moe=NoMoEConfig()), vocab_size)
    return sum(parameter.numel for parameter in dense)


def corpus(cfg: Config) -> tuple[int, int | None]:
    """Return the model's vocabulary, and the tokens of the training data if they are known.

    Data that is not prepared yet has the vocabulary that its keys ask for. Raises UserError where
    neither keys nor data say the vocabulary.
    """
    data = cfg.data
    asked = cfg.model.vocab_size
    if isinstance(data, SyntheticDataConfig):
        return asked or data.vocab_size, data.n_tokens
    if isinstance(data, ShardsDataConfig | PreparedDataConfig):
        found = _inspected(data)
        if found is not None:
            sizes = [info.vocab_size for info in [*found.train, *found.val]]
            own = getattr(data, "vocab_size", None) if isinstance(data, ShardsDataConfig) else None
            return asked or own or max(sizes), sum(info.n_tokens for info in found.train)
    vocab_size = asked or getattr(data, "vocab_size", None)
    if vocab_size is None:
        raise UserError("model.vocab_size=null: must be given, for the data does not say it here")
    return int(vocab_size), None


def _inspected(data: ShardsDataConfig | PreparedDataConfig) -> Any:
    from lunaris.data.folders import inspect_folders, inspect_prepared

    try:
        if isinstance(data, ShardsDataConfig):
            return inspect_folders(data)
        return inspect_prepared(data.dir, document_masking=data.document_masking)
    except UserError:
        return None  # Not prepared yet.


def fitting(
    plan: Plan, memory: int, *, gpu: bool, device: Device | None = None
) -> list[str] | None:
    """Return the overrides nearest to a plan's config whose peak fits into `memory` bytes.

    gpu, device: as for `make_plan`.
    The global batch stays what it is. [] where the config fits as it is, None where nothing tried
    does: smaller micro-steps, activation checkpointing, and FSDP over the same processes.
    """
    for changes in _candidates(plan.cfg):
        cfg = _changed(plan.cfg, changes)
        if make_plan(cfg, gpu=gpu, device=device).needed(gpu=gpu) <= memory:
            return [f"{key}={str(value).lower()}" for key, value in changes.items()]
    return None


def _candidates(cfg: Config) -> list[dict[str, object]]:
    trainer = cfg.trainer
    batches: list[dict[str, object]] = [{}]
    size, steps = trainer.batch_size, trainer.gradient_accumulation_steps
    while size % 2 == 0:
        size, steps = size // 2, steps * 2
        batches.append({"trainer.batch_size": size, "trainer.gradient_accumulation_steps": steps})
    spread: list[dict[str, object]] = [{}]
    if world_size(cfg) > 1 and not isinstance(cfg.parallelism, FSDPConfig):
        spread.append({"parallelism": "fsdp"})
    kinds = ("none", "selective", "full")
    more = kinds[kinds.index(trainer.activation_checkpointing) + 1 :]
    recompute: list[dict[str, object]] = [{}]
    recompute += [{"trainer.activation_checkpointing": kind} for kind in more]
    return [s | r | b for s in spread for r in recompute for b in batches]


def _changed(cfg: Config, changes: dict[str, object]) -> Config:
    keys = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith("trainer.")}
    cfg = replace(cfg, trainer=replace(cfg.trainer, **keys))  # type: ignore[arg-type]
    if "parallelism" in changes:
        degree = getattr(cfg.parallelism, "expert_parallel", 1)
        target = "lunaris.parallelism.fsdp.FSDP"
        cfg = replace(cfg, parallelism=FSDPConfig(_target_=target, expert_parallel=degree))
    return cfg


def host_request(cfg: Config) -> tuple[int, float | None] | None:
    """Return the cores and the memory (GB) that SLURM is asked for on each node, if it is."""
    launch = cfg.launch
    if not isinstance(launch, SlurmLaunchConfig):
        return None
    return launch.cpus_per_task * launch.processes_per_node(), launch.mem_gb
