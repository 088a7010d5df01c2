"""How much of a step is spent on exchanging gradients while nothing else is computed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.distributed.fsdp import FSDPModule

from lunaris.check.item import OK, Item, skipped
from lunaris.check.numbers import wait
from lunaris.config.schema.parallelism import DDPConfig, FSDPConfig
from lunaris.config.schema.root import Config
from lunaris.distributed import collectives, session
from lunaris.model.roles import Role, parameters_in
from lunaris.objective.base import Batch
from lunaris.train import Run

# Pairs of a micro-step that exchanges its gradients and one that does not.
_PAIRS = 5
# The share of forward and backward from which on a config should exchange less.
_MUCH = 0.2
# Of a GPU's memory, that stays free: fragments, and what one block has twice.
_MARGIN = 0.05


def exposed_communication(run: Run, next_batch: Callable[[], Batch]) -> Item:
    """Compare forward and backward with and without the exchange of gradients, in turn.

    The difference is what computation does not hide. Gathers of parameters (fsdp) and exchanges of
    experts' rows are in both, so that they do not count. Leaves gradients of no use behind.
    """
    if session.world_size() == 1:
        return skipped("exposed", "one process exchanges nothing; give launch.processes=N")
    lack = _lack_of_memory(run)
    if lack is not None:
        return skipped("exposed", lack)
    batch = {name: part[0] for name, part in next_batch().items()}
    # With the exchange last: only there fsdp frees the complete gradients of one without.
    pairs = [
        (_micro_step_s(run, batch, exchange=False), _micro_step_s(run, batch, exchange=True))
        for _ in range(1 + _PAIRS)
    ][1:]
    run.optimizer.zero_grad()
    seconds = statistics.median(with_ for _, with_ in pairs)
    share = max(0.0, statistics.median(1 - without / with_ for without, with_ in pairs))
    # All wait for the slowest: its figure counts, and all processes have the same.
    share = max(collectives.gather_objects(share))
    figures = {"share": share, "forward_and_backward_s": seconds}
    text = (
        f"exchanging gradients takes {share:.0%} of forward and backward of a micro-step "
        f"({seconds * 1e3:.3g} ms), over what computation hides; gathers of parameters and rows of "
        "experts are not in it"
    )
    advice = _advice(run.cfg, share) if share > _MUCH else ()
    return Item("exposed", OK, text, figures, advice)


def _lack_of_memory(run: Run) -> str | None:
    """Return why a micro-step without exchange may not fit, the same in all processes, else None.

    fsdp then keeps the gradients of all parameters in each process, in float32.
    """
    device = session.device()
    if device.type != "cuda" or not isinstance(run.model, FSDPModule):
        return None
    of_experts = {id(p) for p in parameters_in(run.model, Role.EXPERT)}
    # Expert parallelism leaves a process a part of the experts.
    needed = 4 * sum(
        p.numel() // (run.parallelism.mesh.expert if id(p) in of_experts else 1)
        for p in run.model.parameters()
    )
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    spare = min(collectives.gather_objects(free + reserved - _MARGIN * total))
    if needed <= spare:
        return None
    return (
        f"needs {needed / 1e9:.1f} GB for the gradients of the whole model in each process, next "
        f"to what a step takes; {max(spare, 0.0) / 1e9:.1f} GB of a GPU are free for that"
    )


def _micro_step_s(run: Run, batch: Batch, *, exchange: bool) -> float:
    """Return the seconds of forward and backward, which all processes begin at once."""
    device, model = run.parallelism.device, run.model
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchange)
    try:
        wait(device)
        collectives.barrier()
        began = time.perf_counter()
        with run.parallelism.micro_step(model, last=exchange):
            with run.precision.autocast():
                loss = run.objective(model, batch).total
            run.precision.scaler.scale(loss).backward()
        wait(device)
        return time.perf_counter() - began
    finally:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)


def _advice(cfg: Config, share: float) -> tuple[str, ...]:
    much = f"{share:.0%} of forward and backward waits for gradients"
    if isinstance(cfg.parallelism, FSDPConfig):
        text = "parallelism=ddp where the model fits, or larger micro-steps (trainer.batch_size)"
        return (f"{text}: fsdp exchanges gradients in each of them, and {much}",)
    if isinstance(cfg.parallelism, DDPConfig):
        steps = 2 * cfg.trainer.gradient_accumulation_steps
        text = f"trainer.gradient_accumulation_steps={steps}, for twice the global batch"
        return (f"{text}: ddp exchanges gradients once a step, and {much}",)
    return ()
