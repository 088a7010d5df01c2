"""What a run exchanges, saves, computes and takes, from a config's keys. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.moe import MoEConfig
from lunaris.config.schema.root import Config
from lunaris.planning.parameters import Kind, Parameter, predictors, routes
from lunaris.planning.sharding import Layout


@dataclass(frozen=True)
class Traffic:
    """The bytes that one process sends in one optimizer step, by what they are for.

    Collectives are counted as rings: n processes send (n - 1) / n of the data for a gather or a
    scatter, and twice that for an all-reduce.
    """

    gradients: int
    parameters: int
    tokens: int

    @property
    def total(self) -> int:
        """All bytes of a step."""
        return self.gradients + self.parameters + self.tokens


def traffic(cfg: Config, parameters: list[Parameter], layout: Layout) -> Traffic:
    """Return what a process sends in a step."""
    micro_steps = cfg.trainer.gradient_accumulation_steps
    gradients = gathered = 0.0
    for parameter in parameters:
        shards, local = layout.shards(parameter), layout.local(parameter)
        if layout.sharded and shards > 1:
            # Gradients are reduced in float32 in every micro-step, and parameters gathered: again
            # for the backward, unless they are kept. The root's are kept.
            times = 2 if layout.reshard and parameter.unit else 1
            gathered += micro_steps * times * layout.gathered(parameter) * _share(shards)
            gradients += micro_steps * 4 * local * shards * _share(shards)
        gradients += 2 * 4 * local * _share(_replicas(parameter, layout, shards))
    return Traffic(int(gradients), int(gathered), _token_bytes(cfg, layout))


def checkpoint_bytes(parameters: list[Parameter], optimizer: int, layout: Layout) -> int:
    """Return the size of a checkpoint: float32 weights and the state of the optimizer.

    optimizer: bytes of one process, of which all are saved, replicas once.
    """
    weights = 4 * sum(p.numel for p in parameters)
    local = 4 * sum(layout.local(p) for p in parameters)
    return weights + round(optimizer * weights / local)


def _replicas(parameter: Parameter, layout: Layout, shards: int) -> int:
    """Return how many processes hold the same elements of a parameter."""
    held = shards
    if parameter.kind is Kind.EXPERT:
        held *= layout.mesh.expert if shards != layout.mesh.shard * layout.mesh.expert else 1
    return layout.mesh.data_world_size // held


def _token_bytes(cfg: Config, layout: Layout) -> int:
    """Return what expert parallelism sends: tokens and their results, forward and backward."""
    processes, moe = layout.mesh.expert, cfg.moe
    if processes == 1 or not isinstance(moe, MoEConfig):
        return 0
    layers = [i for i in range(cfg.model.n_layers + predictors(cfg)) if routes(cfg, i)]
    trainer = cfg.trainer
    rows = trainer.batch_size * cfg.model.max_seq_len * moe.n_experts_per_token
    size = 2 if trainer.half() else 4
    once = size * rows * cfg.model.d_model * _share(processes)
    return int(4 * once * len(layers) * trainer.gradient_accumulation_steps)


def _share(processes: int) -> float:
    return (processes - 1) / processes
