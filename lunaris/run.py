"""From a composed config to a trained model: the only file that instantiates components."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lunaris.checkpoint import Checkpoints, TrainState
from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config
from lunaris.console import phase, say
from lunaris.data.loader import Loader
from lunaris.data.order import SequenceOrder
from lunaris.data.prepare.everywhere import make_ready_everywhere
from lunaris.distributed import collectives, session
from lunaris.distributed.signals import StopSignal
from lunaris.errors import UserError
from lunaris.evaluate import Evaluator
from lunaris.frozen_choices import with_precision
from lunaris.lifecycle import explain_out_of_memory, step_advice, supervise, weights_advice
from lunaris.metrics.churn import RoutingChurn
from lunaris.metrics.loggers import Loggers
from lunaris.metrics.loss_means import LossMeans
from lunaris.metrics.plot import plot_loss
from lunaris.metrics.throughput import Meter, peak_flops
from lunaris.model.layers import ModelShape
from lunaris.model.transformer import Transformer
from lunaris.objective.base import Objective
from lunaris.optim.build import build_optimizer
from lunaris.optim.groups import restore_settings, settings_of
from lunaris.optim.guard import StepGuard
from lunaris.parallelism.base import Parallelism, unwrap
from lunaris.precision import Precision
from lunaris.profiling.profiler import profiler_of
from lunaris.run_summary import conclude, describe, write_parameters
from lunaris.runs.changes import read_changes
from lunaris.runs.data_fingerprint import save_data_fingerprint
from lunaris.runs.facts import facts_of
from lunaris.runs.run_dir import RunDir
from lunaris.train import Run, train
from lunaris.warm_start.begin import start_from


@dataclass
class RunResult:
    """How a run ended: its last step and its best validation loss (nats a token)."""

    step: int
    best_val_loss: float | None


def execute(cfg: Config, path: str | Path) -> RunResult:
    """Train the run in folder `path`, from its newest checkpoint if it has one.

    Every process of the run calls this with the same config. Raises UserError for what the person
    can mend, Stopped after a signal with a checkpoint saved; status.json says how it ended.
    """
    run_dir = RunDir(path)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal(announce=say, processes=session.world_size()))
        stack.enter_context(session.join(cfg.trainer.device, cfg.launch.collective_timeout_s))
        stack.enter_context(supervise(cfg, run_dir))
        run = build(cfg, run_dir, stop)
        stack.callback(run.loader.close)
        stack.callback(run.logger.finish)
        parts = (run.parallelism, unwrap(run.model), run.loader, run.meter, run.logger.message)
        run.profiler = profiler_of(cfg, run_dir.path, *parts)
        with run.profiler, explain_out_of_memory(step_advice(cfg)):
            train(run)
        if run.parallelism.is_writer:
            marks = {change.step: str(change) for change in read_changes(run_dir.path)}
            plot_loss(run_dir.metrics_path, run_dir.path / "loss.png", marks)
            if cfg.checkpoint.consolidated and run.state.step == cfg.trainer.max_steps:
                run.checkpoints.consolidate(run.state.step)
            run.logger.message(conclude(run))
    return RunResult(run.state.step, run.state.best_val_loss)


def build(cfg: Config, run_dir: RunDir, stop: StopSignal) -> Run:
    """Build the components of a run in order and restore its newest checkpoint."""
    data = prepared_data(cfg, run_dir)
    parallelism: Parallelism = instantiate_component("parallelism", cfg.parallelism)
    cfg = with_precision(cfg, run_dir, parallelism.device)
    precision = Precision(cfg.trainer.precision, parallelism.device)
    schedule = instantiate_component("schedule", cfg.schedule, max_steps=cfg.trainer.max_steps)
    checkpoints = Checkpoints(
        run_dir.checkpoints,
        keep_last=cfg.checkpoint.keep_last,
        async_save=cfg.checkpoint.async_save,
        on_error=cfg.checkpoint.on_error,
        facts=facts_of(cfg, run_dir) if session.rank() == 0 else None,
        save_interval=cfg.checkpoint.save_interval,
        # The last one from which a longer run can continue (WSD).
        keep_step=getattr(schedule, "decay_start", None),
    )
    saved = checkpoints.listed()
    # A process alone may leave at once: of a large model on a laptop this takes minutes.
    early = stop.at_once("building the model") if session.world_size() == 1 else nullcontext()
    with phase("building the model"), early, explain_out_of_memory(weights_advice(cfg)):
        model = parallelism.wrap(
            bare_model(cfg, data.vocab_size),
            precision=precision,
            seed=cfg.seed if cfg.init_from is None and not saved else None,
            compile=cfg.trainer.compile_model,
        )
    scale, width = getattr(cfg.moe, "router_lr_scale", 1.0), cfg.model.width_factors().width
    optimizer = build_optimizer(cfg.optimizer, model, router_lr_scale=scale, width_multiplier=width)
    settings = settings_of(optimizer)
    state = checkpoints.load_newest(model, optimizer, saved)
    start = None
    if state is None and cfg.init_from is not None:
        start = start_from(cfg, model, data, bare_model)
        collectives.on_rank_0(lambda: run_dir.add_parent(start.parent))
    state = state or TrainState()
    restore_settings(optimizer, settings)
    collectives.on_rank_0(lambda: run_dir.begin_at(state.step))
    if state.scaler:
        precision.scaler.load_state_dict(state.scaler)
    guard = _guard(cfg, run_dir, parallelism.device)
    if state.guard:
        guard.load_state_dict(state.guard)
    order = _order(run_dir, state)

    churn, stopped = RoutingChurn(state.churn), lambda: stop.received is not None
    trainer, seq_len = cfg.trainer, cfg.model.max_seq_len
    peak = peak_flops(parallelism.device)
    per_rank = trainer.batch_size * trainer.gradient_accumulation_steps
    global_batch = per_rank * parallelism.data_world_size
    most = trainer.eval_steps and trainer.eval_steps * global_batch
    run = Run(
        cfg=cfg,
        dir=run_dir,
        parallelism=parallelism,
        precision=precision,
        model=model,
        objective=instantiate_component("objective", cfg.objective),
        optimizer=optimizer,
        guard=guard,
        schedule=schedule,
        order=order,
        loader=loader_of(cfg, data, parallelism, start=state.sequences, order=order),
        evaluator=evaluator_of(cfg, data, parallelism, most, churn=churn, stopped=stopped),
        checkpoints=checkpoints,
        logger=loggers_of(cfg) if parallelism.is_writer else Loggers({}),
        losses=LossMeans(parallelism.device, state.losses),
        meter=Meter(
            tokens_per_step=global_batch * seq_len,
            flops_per_token=unwrap(model).flops_per_token(seq_len),
            peak=peak and peak * parallelism.world_size,
        ),
        stop=stop,
        state=state,
        global_batch=global_batch,
    )
    # A row that is still to be completed is cut where a later process has logged it.
    run.logger.start(run_dir, cfg, state.step - (state.unfinished is not None))
    run.logger.message(describe(run))
    write_parameters(run)
    if start is not None:
        run.logger.message(str(start))
    return run


def prepared_data(cfg: Config, run_dir: RunDir) -> Any:
    """Build the data component, prepared by rank 0 first, and check the run's fingerprint of it."""
    data = instantiate_component("data", cfg.data)
    with explain_out_of_memory(f"for the data, {cfg.data._target_}"):
        make_ready_everywhere(data)
    collectives.on_rank_0(lambda: save_data_fingerprint(data, run_dir))
    vocab_size = cfg.model.vocab_size
    if vocab_size is not None and vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: smaller than the data's vocabulary of "
            f"{data.vocab_size}; leave it null to take that"
        )
    return data


def bare_model(cfg: Config, data_vocab_size: int, *, predictors: bool = True) -> Transformer:
    """Return the model on the meta device: shapes, no memory, no values.

    predictors: with the modules that the objective adds, which only training needs.
    """
    shape = ModelShape(**{key.name: getattr(cfg.model, key.name) for key in fields(ModelShape)})
    attention = instantiate_component("attention", cfg.attention)
    feed_forward = instantiate_component("moe", cfg.moe)
    objective: Objective = instantiate_component("objective", cfg.objective)
    with torch.device("meta"):
        found = objective.predictors(shape, attention, feed_forward) if predictors else []
        return Transformer(
            shape,
            vocab_size=cfg.model.vocab_size or data_vocab_size,
            tie_embeddings=cfg.model.tie_embeddings,
            attention=attention,
            feed_forward=feed_forward,
            predictors=found,
            activation_checkpointing=cfg.trainer.activation_checkpointing,
        )


def loader_of(
    cfg: Config, data: Any, parallelism: Parallelism, start: int, order: SequenceOrder
) -> Loader:
    """Return the loader of this process's part of every batch from position `start` of `order`."""
    sequences = data.train(cfg.model.max_seq_len, cfg.seed)
    with explain_out_of_memory(step_advice(cfg)):
        return Loader(
            sequences,
            batch_size=cfg.trainer.batch_size,
            accumulation=cfg.trainer.gradient_accumulation_steps,
            rank=parallelism.data_rank,
            world_size=parallelism.data_world_size,
            start=start,
            device=parallelism.device,
            vocab_size=cfg.model.vocab_size or data.vocab_size,
            eot_id=_masked_id(cfg, data),
            order=order,
        )


def evaluator_of(
    cfg: Config, data: Any, parallelism: Parallelism, most: int | None, **keys: Any
) -> Evaluator:
    """Return the evaluator over the validation part.

    most: sequences of each source, or None for all. keys: `stopped` and `churn` of Evaluator.
    """
    return Evaluator(
        data.val(cfg.model.max_seq_len),
        objective=instantiate_component("objective", cfg.objective),
        parallelism=parallelism,
        seq_len=cfg.model.max_seq_len,
        batch_size=cfg.trainer.batch_size,
        max_sequences=most,
        eot_id=_masked_id(cfg, data),
        **keys,
    )


def loggers_of(cfg: Config) -> Loggers:
    """Return the loggers of the `logger` group by name."""
    chosen = cfg.logger.items()
    return Loggers({name: instantiate_component(f"logger.{name}", keys) for name, keys in chosen})


def _guard(cfg: Config, run_dir: RunDir, device: torch.device) -> StepGuard:
    trainer = cfg.trainer
    return StepGuard(
        max_skipped_steps=trainer.max_skipped_steps,
        skip_spikes=trainer.skip_spikes,
        window=trainer.spike_window,
        threshold=trainer.spike_threshold,
        device=device,
        run=str(run_dir.path),
    )


def _order(run_dir: RunDir, state: TrainState) -> SequenceOrder:
    """Return the order without what the checkpoint or provenance.json leaves out."""
    noted = collectives.from_rank_0(run_dir.left_out())
    order = SequenceOrder.without([*((a, b) for a, b in state.left_out), *noted])
    state.left_out = [list(pair) for pair in order.left_out]
    return order


def _masked_id(cfg: Config, data: Any) -> int | None:
    """Return the id at which attention and targets stop, if they are to."""
    return data.eot_id if cfg.data.document_masking else None
