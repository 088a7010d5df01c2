"""The training loop: take a step; once in a while log, evaluate, save.

Nothing here knows which parallelism, logger or optimizer was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lunaris.checkpoint import Checkpoints, TrainState
from lunaris.data.loader import Loader, StepBatch
from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped
from lunaris.evaluate import Evaluator
from lunaris.metrics.loggers import Logger
from lunaris.metrics.records import Row
from lunaris.metrics.throughput import Meter, peak_memory_gb
from lunaris.optim.clip import clip_grad_norm
from lunaris.optim.groups import set_learning_rate
from lunaris.optim.schedule import Constant
from lunaris.parallelism.base import Parallelism, unwrap
from lunaris.precision import Precision
from lunaris.runs.run_dir import RunDir


@dataclass
class Run:
    """Everything one run is made of; built by `lunaris.run`."""

    cfg: Any
    dir: RunDir
    parallelism: Parallelism
    precision: Precision
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Constant
    loader: Loader
    evaluator: Evaluator
    checkpoints: Checkpoints
    logger: Logger
    meter: Meter
    stop: StopSignal
    state: TrainState
    global_batch: int  # sequences an optimizer step, of all processes


@dataclass
class StepStats:
    """What one optimizer step measured, over all processes and micro-steps; on the device.

    main_loss, aux_loss: [] mean over the global batch (nats a token); grad_norm: [] before
    clipping; load: [n_moe_layers, n_experts] tokens routed; dropped: [n_moe_layers] assignments.
    """

    main_loss: Tensor
    aux_loss: Tensor
    grad_norm: Tensor
    load: Tensor
    dropped: Tensor


def train(run: Run) -> None:
    """Train until `trainer.max_steps`. Raises Stopped, with a checkpoint saved, on a signal."""
    state, trainer = run.state, run.cfg.trainer
    if state.step == 0:
        with run.meter.paused():
            run.logger.log({"step": 0} | evaluate(run))
    batches = iter(run.loader)
    while state.step < trainer.max_steps:
        stats = train_step(run, next(batches))
        state.step += 1
        state.sequences += run.global_batch
        run.meter.step(run.loader.wait_s)
        run.logger.tick(state.step)

        last = state.step == trainer.max_steps
        stop = run.parallelism.agree(run.stop.received is not None)
        row: Row = {}
        if last or state.step % trainer.log_interval == 0:
            row |= step_row(run, stats)
        with run.meter.paused():
            if last or (trainer.eval_interval and state.step % trainer.eval_interval == 0):
                row |= evaluate(run)
            if row:
                run.logger.log({"step": state.step} | row)
            if last or stop or state.step % run.cfg.checkpoint.save_interval == 0:
                save(run, stats)
            run.checkpoints.poll()
        if stop and not last:
            run.checkpoints.settle()
            reason = run.stop.received.name if run.stop.received else "a signal to another process"
            raise Stopped(f"stopped by {reason} at step {state.step}; a checkpoint is saved")
    run.checkpoints.settle()


def train_step(run: Run, batch: StepBatch) -> StepStats:
    """Take one optimizer step on a process's part of the global batch ([A, B, L] tokens)."""
    # All randomness of a step (dropout) is a function of seed, step and rank: nothing to restore.
    torch.manual_seed(_mix(run.cfg.seed, run.state.step, run.parallelism.rank))
    set_learning_rate(run.optimizer.param_groups, run.schedule(run.state.step))
    run.model.train()
    weights = micro_step_weights(run, batch)
    micro_steps = len(batch.tokens)
    totals: dict[str, Tensor] = {}
    for i in range(micro_steps):
        documents = None if batch.documents is None else batch.documents[i]
        with run.parallelism.micro_step(run.model, last=i == micro_steps - 1):
            with run.precision.autocast():
                out = run.model(batch.tokens[i], batch.targets[i], documents=documents)
                loss = out.main_loss * weights[i] + out.aux_loss / micro_steps
            run.precision.scaler.scale(loss).backward()
        for name, value in (
            ("main_loss", out.main_loss * weights[i]),
            ("aux_loss", out.aux_loss / micro_steps),
            ("load", out.load),
            ("dropped", out.dropped),
        ):
            totals[name] = totals.get(name, 0) + value.detach().double()
    run.precision.scaler.unscale_(run.optimizer)
    grad_norm = clip_grad_norm(run.model.parameters(), run.cfg.trainer.grad_clip)
    run.precision.scaler.step(run.optimizer)
    run.precision.scaler.update()
    run.optimizer.zero_grad()

    main_loss, aux_loss, load, dropped = _sum_over_ranks(run.parallelism, totals)
    unwrap(run.model).update_balance(load)
    world = run.parallelism.world_size
    return StepStats(main_loss / world, aux_loss / world, grad_norm, load, dropped)


def micro_step_weights(run: Run, batch: StepBatch) -> Tensor | list[float]:
    """Return each micro-step's weight ([A]), so that every target of the global batch counts alike.

    Without document masking all micro-steps have as many targets: 1 / A. With it, a micro-step
    weighs by its share of the global batch's targets, times the processes over which gradients
    are averaged.
    """
    micro_steps = len(batch.tokens)
    if batch.documents is None:
        return [1 / micro_steps] * micro_steps
    counts = (batch.targets >= 0).sum(dim=(1, 2)).double()
    total = run.parallelism.sum(counts.sum()).clamp_min(1)
    return (counts * run.parallelism.world_size / total).float()


def step_row(run: Run, stats: StepStats) -> Row:
    """Return the `train/`, `moe/` and `perf/` metrics of a step; waits for the device.

    Raises RuntimeError when the loss is not finite, before such weights can be saved.
    """
    main_loss, aux_loss = require_finite(run, stats), stats.aux_loss.item()
    memory = torch.zeros(run.parallelism.world_size, device=run.parallelism.device)
    memory[run.parallelism.rank] = peak_memory_gb(run.parallelism.device)
    row: Row = {
        "train/loss": main_loss + aux_loss,
        "train/main_loss": main_loss,
        "train/aux_loss": aux_loss,
        "train/perplexity": math.exp(min(main_loss, 700.0)),
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/grad_norm": stats.grad_norm.item(),
        "train/sequences": run.state.sequences,
    }
    if run.precision.scaler.is_enabled():
        row["train/loss_scale"] = run.precision.scaler.get_scale()
    row |= moe_row(unwrap(run.model).moe_layers(), stats)
    row |= run.meter.row()
    row["perf/peak_memory_gb"] = run.parallelism.sum(memory).tolist()
    write_progress(run)
    return row


def moe_row(layers: list[int], stats: StepStats) -> Row:
    """Return each layer's expert shares (sum 1) and drop rate, and the extremes over all layers."""
    row: Row = {}
    shares = []
    for i, load, dropped in zip(layers, stats.load.tolist(), stats.dropped.tolist(), strict=True):
        total = sum(load)
        if total > 0:
            share = [tokens / total for tokens in load]
            row[f"moe/layer_{i:02d}/load"] = share
            row[f"moe/layer_{i:02d}/drop_rate"] = dropped / total
            shares += [s * len(load) for s in share]
    if shares:
        row |= {"moe/max_load": max(shares), "moe/min_load": min(shares)}
    return row


def evaluate(run: Run) -> Row:
    """Return the `val/` metrics of the model as it is; every process calls this."""
    with run.precision.autocast():
        row = run.evaluator(run.model)
    loss = row.get("val/loss")
    if loss is not None:
        _require_finite(run, "val/loss", loss)
        best = run.state.best_val_loss
        run.state.best_val_loss = loss if best is None else min(best, loss)
    return row


def save(run: Run, stats: StepStats) -> None:
    """Save a checkpoint of the step just taken."""
    require_finite(run, stats)
    run.logger.flush()
    run.state.scaler = run.precision.scaler.state_dict()
    run.checkpoints.save(run.model, run.optimizer, run.state)
    write_progress(run)


def require_finite(run: Run, stats: StepStats) -> float:
    """Return the step's main loss. Raises RuntimeError unless it and the gradients are finite."""
    loss = stats.main_loss.item()
    _require_finite(run, "train/main_loss", loss)
    if not run.precision.scaler.is_enabled():  # A scaler looks for overflow and skips the step.
        _require_finite(run, "train/grad_norm", stats.grad_norm.item())
    return loss


def _require_finite(run: Run, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise RuntimeError(
            f"{name} is {value} at step {run.state.step}; lower optimizer.learning_rate or set "
            "trainer.grad_clip. The last checkpoint is kept"
        )


def write_progress(run: Run) -> None:
    """Put the step and the best validation loss into status.json (rank 0)."""
    if run.parallelism.rank == 0:
        run.dir.write_status(step=run.state.step, best_val_loss=run.state.best_val_loss)


def _sum_over_ranks(parallelism: Parallelism, totals: dict[str, Tensor]) -> list[Tensor]:
    """Sum all totals over the processes in one collective."""
    parts = [totals[name] for name in ("main_loss", "aux_loss", "load", "dropped")]
    flat = parallelism.sum(torch.cat([part.reshape(-1) for part in parts]))
    sizes = [part.numel() for part in parts]
    return [x.view_as(p) for x, p in zip(flat.split(sizes), parts, strict=True)]


def _mix(*numbers: int) -> int:
    """Return a 63-bit seed from several numbers (splitmix64, applied in turn)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        mixed ^= mixed >> 31
    return mixed >> 1
