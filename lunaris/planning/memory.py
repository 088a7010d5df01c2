"""The memory of one process of a run, by part, from a config's keys. No torch.

What stays for the whole run (weights, optimizer state) and what a forward keeps are exact. The peak
is the largest of three instants: the vocabulary loss, the backward of one block, the optimizer's
step; the temporary tensors of an instant are an estimate. Not counted: the CUDA context, the
libraries' workspaces and NCCL's buffers (together about 2 GiB on a GPU), fragmentation of the
allocator, and experts that get more than their share of the tokens. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lunaris.config.schema.moe import MoEConfig
from lunaris.config.schema.optimizer import MuonConfig
from lunaris.config.schema.root import Config
from lunaris.config.widths import GATED, first_columns
from lunaris.planning.activations import (
    Saved,
    block_bytes,
    saved_activations,
)
from lunaris.planning.parameters import (
    Kind,
    Parameter,
    dense_width,
    expert_width,
    routes,
)
from lunaris.planning.sharding import Layout
from lunaris.planning.sizes import expert_blocks, local_experts

# As in `lunaris.model.loss`: logits that are in memory at once, on a CPU and on a GPU.
_LOGITS, _LOGITS_GPU = 1 << 22, 1 << 26
# As in `lunaris.parallelism.reducer`.
_BUCKET = 25 << 20
# As in `lunaris.optim.muon`, elements.
_MUON = 1 << 25
# What a GPU holds besides tensors: the CUDA context, cuBLAS's workspaces, NCCL's buffers.
GPU_RESERVE = 2 << 30


@dataclass(frozen=True)
class Memory:
    """The memory of the process with the most of it.

    weights, gradients, optimizer: all run long, but gradients, which live from a backward to a
    step. activations: kept by a forward. gathered: parameters that FSDP gathers around the modules
    that compute. temporary: the other tensors of the fullest instant. peak: all at that instant.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int
    temporary: int
    peak: int
    instant: str


def memory_of(
    cfg: Config,
    parameters: list[Parameter],
    layout: Layout,
    *,
    gpu: bool,
    padded: bool = False,
) -> Memory:
    """Return the memory of the first process, which holds at least as much as any other.

    gpu: on a GPU, else on a CPU. padded: experts multiply padded blocks of rows.
    """
    weights = 4 * sum(layout.local(p) for p in parameters)
    optimizer = sum(_optimizer_bytes(cfg, p, layout.local(p)) for p in parameters)
    saved = saved_activations(cfg, parameters, gpu=gpu, sharded=layout.sharded, padded=padded)
    logits = logits_bytes(cfg, parameters[0].shape[0], gpu)
    inside = _backward_bytes(cfg, gpu, padded)
    if cfg.trainer.activation_checkpointing != "none":
        inside += block_bytes(cfg, parameters, gpu=gpu, sharded=layout.sharded, padded=padded)
    instants = _instants(cfg, parameters, layout, saved, logits, inside, gpu)
    instant, (held, temporary) = max(instants.items(), key=lambda item: sum(item[1]))
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        activations=saved.total,
        logits=logits,
        gathered=_gathered(parameters, layout),
        temporary=temporary,
        peak=weights + optimizer + held + temporary,
        instant=instant,
    )


def logits_bytes(cfg: Config, vocab_size: int, gpu: bool) -> int:
    """Return the bytes of the vocabulary loss's logits: two chunks, in two forms each."""
    chunk = max(64, (_LOGITS_GPU if gpu else _LOGITS) // vocab_size)
    rows = min(chunk, cfg.trainer.batch_size * cfg.model.max_seq_len)
    chunks = 3 if rows < cfg.trainer.batch_size * cfg.model.max_seq_len else 2
    size = 4 * chunks + 4 if cfg.trainer.half() else 4 * chunks
    return size * rows * vocab_size


def _optimizer_bytes(cfg: Config, parameter: Parameter, local: int) -> int:
    """Return what the optimizer keeps of a parameter: two moments and a step, or one momentum."""
    muon = isinstance(cfg.optimizer, MuonConfig)
    if muon and parameter.kind in (Kind.MATRIX, Kind.EXPERT):
        return 4 * local
    return 8 * local + 4


def _instants(
    cfg: Config,
    parameters: list[Parameter],
    layout: Layout,
    saved: Saved,
    logits: int,
    inside: int,
    gpu: bool,
) -> dict[str, tuple[int, int]]:
    """Return the fullest instants: what is held besides weights and optimizer, and temporaries.

    inside: the temporary tensors of the backward of a block.
    """
    gradients = {unit: 0 for unit in _units(parameters)}
    for parameter in parameters:
        gradients[parameter.unit] += 4 * layout.local(parameter)
    all_gradients = sum(gradients.values())
    accumulated = cfg.trainer.gradient_accumulation_steps > 1
    gathered = _gathered(parameters, layout)
    found = {
        "the vocabulary loss": (
            saved.total + (all_gradients if accumulated else 0) + gathered,
            logits,
        )
    }
    units = [unit for unit in gradients if unit]
    temporary = inside + _exchanged(parameters, layout)
    # Gradients of later units exist while an earlier unit's activations are still kept.
    later, kept = gradients[""], sum(saved.blocks)
    fullest = 0
    for unit, own in zip(units[::-1], saved.blocks[::-1], strict=True):
        later += gradients[unit]
        fullest = max(fullest, kept + (all_gradients if accumulated else later))
        kept -= own
    found["the backward of a block"] = (fullest + gathered, temporary)
    found["the optimizer's step"] = (all_gradients, _step_bytes(cfg, parameters, layout, gpu))
    return found


def _backward_bytes(cfg: Config, gpu: bool, padded: bool) -> int:
    """Return what a feed-forward's backward holds besides what its forward kept.

    Those are two gradients of its hidden width, the gradients of its input and output, and on a GPU
    a copy of the stacked gradients of experts. Blocks beyond each expert's first one have a copy of
    its weights, or the gradient of one.
    """
    model, trainer = cfg.model, cfg.trainer
    tokens = trainer.batch_size * model.max_seq_len
    size = 2 if trainer.half() else 4
    rows, hidden = tokens, dense_width(cfg)
    copies = 0
    if routes(cfg, model.n_layers - 1) and isinstance(cfg.moe, MoEConfig):
        rows, hidden = tokens * cfg.moe.n_experts_per_token, expert_width(cfg)
        if padded:
            blocks = expert_blocks(cfg, model.max_seq_len)
            rows = blocks.total(local_experts(cfg))
            columns = first_columns(GATED[model.activation], hidden)
            copies = size * blocks.extra * model.d_model * columns
    inside = size * rows * 2 * hidden
    copies += _stacked_bytes(cfg) if gpu or padded else 0
    return inside + copies + 4 * (rows + tokens) * model.d_model


def _stacked_bytes(cfg: Config) -> int:
    """Return the copy of a layer's stacked gradients that is made of those of its experts."""
    if not isinstance(cfg.moe, MoEConfig):
        return 0
    columns = first_columns(GATED[cfg.model.activation], expert_width(cfg))
    return 4 * cfg.moe.n_experts * cfg.model.d_model * columns


def _step_bytes(cfg: Config, parameters: list[Parameter], layout: Layout, gpu: bool) -> int:
    """Return the temporaries of an optimizer's step: what Muon orthogonalizes, and its results.

    Those are of one parameter on a CPU. Shards are sent, received and put together, both ways.
    """
    if not isinstance(cfg.optimizer, MuonConfig):
        return 0
    parts = [layout.local(p) for p in parameters if p.kind in (Kind.MATRIX, Kind.EXPERT)]
    largest = max(parts)
    bucket = min(sum(parts), _MUON + largest) if gpu or layout.sharded else largest
    copies = 7 if layout.sharded else 2
    return 4 * copies * bucket + 12 * (bucket if gpu else largest)


def _gathered(parameters: list[Parameter], layout: Layout) -> int:
    """Return the bytes of gathered parameters: the root's, and two blocks' or all."""
    if not layout.sharded:
        return 0
    of_unit = {unit: 0 for unit in _units(parameters)}
    for parameter in parameters:
        of_unit[parameter.unit] += layout.gathered(parameter)
    root = of_unit.pop("")
    blocks = sorted(of_unit.values(), reverse=True)
    # The next block is gathered while one computes.
    return root + sum(blocks[:2] if layout.reshard else blocks)


def _exchanged(parameters: list[Parameter], layout: Layout) -> int:
    """Return the buffers of gradients on their way: a bucket of DDP, or FSDP's block."""
    if layout.mesh.data_world_size == 1:
        return 0
    if not layout.sharded:
        return max(_BUCKET, *(4 * layout.local(p) for p in parameters))
    of_unit = {unit: 0 for unit in _units(parameters)}
    for parameter in parameters:
        size = layout.gathered(parameter)
        # In the dtype of the products from the backward, in float32 on the way.
        of_unit[parameter.unit] += size + (2 * size if layout.half and parameter.unit else size)
    return max(size for unit, size in of_unit.items() if unit)


def _units(parameters: Iterable[Parameter]) -> list[str]:
    return list(dict.fromkeys(p.unit for p in parameters))
