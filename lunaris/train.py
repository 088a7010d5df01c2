"""The training loop: take a step; once in a while log, evaluate, save.

Nothing here knows which parallelism, logger or optimizer was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lunaris.checkpoint import Checkpoints, TrainState
from lunaris.config.schema.root import Config
from lunaris.console import phase
from lunaris.data.loader import Loader
from lunaris.data.order import SequenceOrder
from lunaris.distributed.signals import StopSignal
from lunaris.errors import RunFailed, Stopped
from lunaris.evaluate import EvaluationStopped, Evaluator
from lunaris.metrics.expert_health import LayerRouting, expert_row
from lunaris.metrics.loggers import Logger
from lunaris.metrics.loss_means import LossMeans
from lunaris.metrics.records import Row
from lunaris.metrics.throughput import Meter, peak_memory_gb
from lunaris.model.transformer import Transformer
from lunaris.objective.base import Batch, Objective
from lunaris.optim.clip import clip_grad_norm
from lunaris.optim.groups import set_learning_rate
from lunaris.optim.guard import StepGuard, StepRange, restore_where, take_step
from lunaris.optim.schedule import Schedule
from lunaris.parallelism.base import Parallelism, sum_named, unwrap
from lunaris.precision import Precision
from lunaris.profiling.profiler import Profiler
from lunaris.runs.run_dir import RunDir


@dataclass
class Run:
    """Everything one run is made of; built by `lunaris.run`."""

    cfg: Config
    dir: RunDir
    parallelism: Parallelism
    precision: Precision
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    schedule: Schedule
    order: SequenceOrder
    loader: Loader
    evaluator: Evaluator
    checkpoints: Checkpoints
    logger: Logger
    losses: LossMeans
    meter: Meter
    stop: StopSignal
    state: TrainState
    global_batch: int  # sequences an optimizer step, of all data ranks
    profiler: Profiler = Profiler()


@dataclass
class StepStats:
    """What one optimizer step measured, over all processes and micro-steps; on the device.

    losses: each [] mean over the global batch; weights: their factors in the loss that is
    minimised; grad_norm: [] before clipping; load, dropped, confidence: of each routed layer, as in
    `ModelOutput`; votes: [] how many processes had been told to stop.
    """

    losses: dict[str, Tensor]
    weights: dict[str, float]
    grad_norm: Tensor
    load: Tensor
    dropped: Tensor
    confidence: Tensor
    votes: Tensor

    def loss(self) -> Tensor:
        """Return the loss that is minimised, [] float64."""
        return sum((w * self.losses[name] for name, w in self.weights.items()), torch.tensor(0.0))


def train(run: Run) -> None:
    """Train until `trainer.max_steps`, or pause at `trainer.stop_at`.

    Raises Stopped on a signal, with a checkpoint saved unless it meets the first evaluation.
    Raises RunFailed when too many steps in a row had to be skipped.
    """
    state, trainer = run.state, run.cfg.trainer
    if state.step == 0 or state.unfinished is not None:
        log_missing_row(run)
    batches = iter(run.loader)
    while state.step < trainer.end():
        with run.profiler.step(state.step + 1):
            stats = train_step(run, next(batches))
        state.step += 1
        state.sequences = sequences_of_step(run)[1] + 1
        report_skips(run, lag=1)
        run.meter.step(run.loader.wait_s)
        run.logger.tick(state.step)

        last = state.step == trainer.max_steps
        stop = run.parallelism.agree(run.stop.received is not None, stats.votes)
        row: Row = {}
        if last or state.step % trainer.log_interval == 0:
            row |= step_row(run, stats)
        with run.meter.paused():
            if last or (trainer.eval_interval and state.step % trainer.eval_interval == 0):
                try:
                    row |= evaluate(run)
                except EvaluationStopped:
                    state.unfinished, stop = row, True
            if row and state.unfinished is None:
                run.logger.log({"step": state.step} | row)
            ends = stop or state.step == trainer.end()
            if ends or run.checkpoints.is_due(state.step):
                save(run, last=ends)
            run.checkpoints.try_finalize()
        if state.unfinished is not None or (stop and state.step < trainer.end()):
            run.checkpoints.wait_pending()
            raise Stopped(f"stopped by {run.stop.name} at step {state.step}; a checkpoint is saved")
    run.checkpoints.wait_pending()


def log_missing_row(run: Run) -> None:
    """Evaluate and log the row of step 0, or of the step whose evaluation a signal stopped.

    Raises Stopped where a signal stops it; a checkpoint that was there is as it was.
    """
    state = run.state
    with run.meter.paused():
        try:
            row = (state.unfinished or {}) | evaluate(run)
        except EvaluationStopped:
            at = f"stopped by {run.stop.name} while evaluating at step {state.step}"
            raise Stopped(f"{at}; the same command continues there") from None
        run.logger.log({"step": state.step} | row)
    state.unfinished = None
    write_progress(run)


def train_step(run: Run, batch: Batch) -> StepStats:
    """Take one optimizer step on a process's part of the global batch ([A, B, L] tokens)."""
    # All randomness of a step (dropout) is a function of seed, step and data rank, so that a
    # resumed run has nothing to restore.
    torch.manual_seed(_mix(run.cfg.seed, run.state.step, run.parallelism.data_rank))
    set_learning_rate(run.optimizer.param_groups, run.schedule(run.state.step))
    run.model.train()
    weights = micro_step_weights(run, batch)
    micro_steps = len(batch["tokens"])
    totals: dict[str, Tensor] = {}
    for i in range(micro_steps):
        with run.parallelism.micro_step(run.model, last=i == micro_steps - 1):
            with run.precision.autocast():
                out = run.objective(run.model, {name: part[i] for name, part in batch.items()})
                out = out.scaled(weights[i], micro_steps)
                loss = out.total
            run.precision.scaler.scale(loss).backward()
        values = {f"{name}_loss": loss.value for name, loss in out.losses.items()}
        values |= {name: getattr(out, name) for name in ("load", "dropped", "confidence")}
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value.detach().double()
    run.precision.scaler.unscale_(run.optimizer)
    grad_norm = clip_grad_norm(run.model.parameters(), run.cfg.trainer.grad_clip)
    told = run.parallelism.vote(run.stop.received is not None)
    totals = sum_named(run.parallelism, totals | {"grad_norm": grad_norm.double(), "votes": told})
    world = run.parallelism.data_world_size
    stats = StepStats(
        {name: totals[f"{name}_loss"] / world for name in out.losses},
        {name: loss.weight for name, loss in out.losses.items()},
        grad_norm,
        totals["load"],
        totals["dropped"],
        totals["confidence"] / (micro_steps * world),
        totals["votes"],
    )
    at = StepRange(run.state.step + 1, *sequences_of_step(run))
    loss = stats.loss()
    skip = run.guard.judge(at, loss, totals["grad_norm"] / world)
    run.losses.add({"loss": loss, **{f"{n}_loss": x for n, x in stats.losses.items()}}, skip)
    take_step(run.optimizer, skip)
    run.precision.scaler.update()
    run.optimizer.zero_grad()
    balance_experts(unwrap(run.model), stats.load, skip)
    return stats


def balance_experts(model: Transformer, load: Tensor, skip: Tensor) -> None:
    """Let the routers balance their experts ([n_moe_layers, E] tokens) unless `skip` ([]) is 1."""
    buffers = model.balance_buffers()
    saved = [buffer.clone() for buffer in buffers]
    model.update_balance(load)
    restore_where(skip, buffers, saved)


def sequences_of_step(run: Run) -> tuple[int, int]:
    """Return the first and the last sequence of the global batch that comes next."""
    return run.order.first_and_last(run.state.sequences, run.global_batch)


def report_skips(run: Run, lag: int = 0) -> None:
    """Report the skipped steps and outliers up to the last step, or with lag 1 the one before."""
    for event in run.guard.settle(lag):
        run.logger.message(str(event))


def micro_step_weights(run: Run, batch: Batch) -> Tensor | list[float]:
    """Return each micro-step's weight ([A]), so that every target of the global batch counts alike.

    Where all micro-steps have equally many targets it is 1 / A. Otherwise a micro-step weighs by
    its share of the global batch's targets, times the data ranks over which gradients are averaged.
    """
    micro_steps = len(batch["tokens"])
    if not run.objective.targets_vary(batch):
        return [1 / micro_steps] * micro_steps
    counts = run.objective.count_targets(batch).double()
    total = run.parallelism.sum(counts.sum()).clamp_min(1)
    return (counts * run.parallelism.data_world_size / total).float()


def step_row(run: Run, stats: StepStats) -> Row:
    """Return the `train/`, `moe/` and `perf/` metrics of a step; waits for the device.

    The losses are means over the steps since the last row that were not skipped.
    """
    report_skips(run)
    tokens = run.state.sequences * run.cfg.model.max_seq_len
    row: Row = {
        **run.losses.row(begin_again=run.state.step % run.cfg.trainer.log_interval == 0),
        "train/skipped_steps": run.guard.skipped,
        "train/spikes": run.guard.spikes,
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/grad_norm": stats.grad_norm.item(),
        "train/sequences": run.state.sequences,
        "train/tokens": tokens,
        "train/flops": tokens * run.meter.flops_per_token,
    }
    if run.precision.scaler.is_enabled():
        row["train/loss_scale"] = run.precision.scaler.get_scale()
    row |= moe_row(unwrap(run.model), stats) | run.meter.row()
    row["perf/peak_memory_gb"] = run.parallelism.gather(peak_memory_gb(run.parallelism.device))
    write_progress(run)
    return row


def moe_row(model: Transformer, stats: StepStats) -> Row:
    """Return the `moe/` metrics of a step; waits for the device."""
    columns = (x.tolist() for x in (stats.load, stats.dropped, stats.confidence))
    numbers = [{n: x.item() for n, x in found.items()} for found in model.routing_numbers()]
    return expert_row(map(LayerRouting, model.moe_layers(), *columns, numbers))


def evaluate(run: Run) -> Row:
    """Return the `val/` metrics of the model as it is; every process calls this."""
    with phase("evaluating", log=run.state.step == 0), run.precision.autocast():
        row = run.evaluator(run.model)
    loss = row.get("val/loss")
    if loss is not None:
        if not math.isfinite(loss):
            raise RunFailed(
                f"val/loss is {loss} at step {run.state.step}; lower optimizer.learning_rate, by "
                f"`lunaris resume {run.dir.path} KEY=VALUE`. The last checkpoint is kept"
            )
        best = run.state.best_val_loss
        run.state.best_val_loss = loss if best is None else min(best, loss)
    return row


def save(run: Run, *, last: bool) -> None:
    """Save a checkpoint of the step just taken; last: the process ends after it.

    Raises RunFailed as `Checkpoints.save` does.
    """
    report_skips(run)
    run.logger.flush()
    run.state.scaler = run.precision.scaler.state_dict()
    run.state.guard = run.guard.state_dict()
    run.state.losses = run.losses.state_dict()
    run.state.churn = run.evaluator.churn.state_dict()
    run.checkpoints.save(run.model, run.optimizer, run.state, last=last)
    write_progress(run)


def write_progress(run: Run) -> None:
    """Write the step, the best validation loss and the tokens read to status.json."""
    if run.parallelism.is_writer:
        tokens = run.state.sequences * run.cfg.model.max_seq_len
        best = run.state.best_val_loss
        run.dir.write_status(step=run.state.step, best_val_loss=best, tokens=tokens)


def _mix(*numbers: int) -> int:
    """Return a 63-bit seed from several numbers (splitmix64, applied in turn)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        mixed ^= mixed >> 31
    return mixed >> 1
