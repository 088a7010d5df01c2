"""From a composed config to a trained model: the only file that instantiates components."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from lunaris.checkpoint import Checkpoints, TrainState, complete
from lunaris.config.instantiate import check_fit
from lunaris.data.loader import Loader
from lunaris.distributed import session as distributed
from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped, UserError
from lunaris.evaluate import Evaluator
from lunaris.metrics.loggers import LocalLogger, Logger, Loggers
from lunaris.metrics.plot import plot_loss
from lunaris.metrics.records import read_rows
from lunaris.metrics.throughput import Meter, peak_flops
from lunaris.model.transformer import Transformer
from lunaris.parallelism.base import Parallelism, unwrap
from lunaris.precision import Precision
from lunaris.runs.data_fingerprint import keep
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import current_job_id
from lunaris.train import Run, train


@dataclass
class RunResult:
    """How a run ended: its last step and its best validation loss (nats a token)."""

    step: int
    best_val_loss: float | None


def execute(cfg: Any, path: str | Path) -> RunResult:
    """Train the run in folder `path`, from its newest checkpoint if it has one.

    Every process of the run calls this with the same config. Raises UserError for what the person
    can mend, Stopped after a signal with a checkpoint saved; status.json says how it ended.
    """
    run_dir = RunDir(path)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(
            distributed.session(cfg.trainer.device, cfg.launch.collective_timeout_s)
        )
        stack.enter_context(_held(run_dir))
        stack.enter_context(_recorded(run_dir))
        run = build(cfg, run_dir, stop)
        stack.callback(run.loader.close)
        stack.callback(run.logger.finish)
        with _memory_told(_step_advice(cfg)):
            train(run)
        if run.parallelism.rank == 0:
            plot_loss(run_dir.metrics_path, run_dir.path / "loss.png")
            if cfg.checkpoint.consolidated:
                run.checkpoints.consolidate(run.state.step)
            run.logger.message(conclude(run))
    return RunResult(run.state.step, run.state.best_val_loss)


def component(cfg: Any, **inputs: Any) -> Any:
    """Build a config group's component from its keys and its run-time inputs.

    Raises UserError when its class cannot be imported or does not take them.
    """
    said = f"{cfg._get_full_key('_target_')}={cfg._target_}"
    try:
        made = instantiate(cfg, _partial_=True, _convert_="all")
    except InstantiationException as error:
        if not str(error).startswith(("Error locating", "Expected a callable")):
            raise
        reason = str(error.__cause__ or "not a class").splitlines()[0]
        raise UserError(f"{said}: cannot be imported: {reason}") from error
    check_fit(said, made.func, made.args, made.keywords | inputs)
    return made(**inputs)


def build(cfg: Any, run_dir: RunDir, stop: StopSignal) -> Run:
    """Build the components of a run in order and restore its newest checkpoint."""
    data = prepared_data(cfg, run_dir)
    parallelism: Parallelism = component(cfg.parallelism)
    precision = Precision(cfg.trainer.precision, parallelism.device)
    with _memory_told(
        "for the weights; a smaller model, or parallelism=fsdp over more processes, takes less"
    ):
        model = parallelism.wrap(
            bare_model(cfg, data.vocab_size),
            precision=precision,
            seed=cfg.seed,
            compile=cfg.trainer.compile_model,
        )
    optimizer = component(
        cfg.optimizer, model=model, router_lr_scale=cfg.moe.get("router_lr_scale", 1.0)
    )
    schedule = component(cfg.schedule, max_steps=cfg.trainer.max_steps)
    checkpoints = Checkpoints(
        run_dir.checkpoints,
        keep_last=cfg.checkpoint.keep_last,
        async_save=cfg.checkpoint.async_save,
    )
    state = checkpoints.load_newest(model, optimizer) or TrainState()
    if state.scaler:
        precision.scaler.load_state_dict(state.scaler)

    seq_len, trainer = cfg.model.max_seq_len, cfg.trainer
    global_batch = trainer.batch_size * trainer.gradient_accumulation_steps * parallelism.world_size
    loader = loader_of(cfg, data, parallelism, start=state.sequences)
    evaluator = evaluator_of(
        cfg,
        data,
        parallelism,
        most=trainer.eval_steps and trainer.eval_steps * global_batch,
    )
    logger = loggers_of(cfg) if parallelism.rank == 0 else Loggers({})
    logger.start(run_dir, cfg, state.step)
    run = Run(
        cfg=cfg,
        dir=run_dir,
        parallelism=parallelism,
        precision=precision,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        evaluator=evaluator,
        checkpoints=checkpoints,
        logger=logger,
        meter=_meter(unwrap(model), parallelism, seq_len, global_batch),
        stop=stop,
        state=state,
        global_batch=global_batch,
    )
    logger.message(describe(run))
    return run


def prepared_data(cfg: Any, run_dir: RunDir) -> Any:
    """Build the data component, made ready by rank 0 first, and hold the run to it."""
    data = component(cfg.data)
    with _memory_told(f"for the data, {cfg.data._target_}"):
        distributed.on_rank_0(data.prepare)
        data.prepare()
    distributed.on_rank_0(lambda: keep(data, run_dir))
    vocab_size = cfg.model.vocab_size
    if vocab_size is not None and vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: smaller than the data's vocabulary of "
            f"{data.vocab_size}; leave it null to take that"
        )
    return data


def bare_model(cfg: Any, data_vocab_size: int) -> Transformer:
    """Return the model on the meta device: shapes, no memory, no values."""
    keys = dict(cfg.model) | {"vocab_size": cfg.model.vocab_size or data_vocab_size}
    with torch.device("meta"):
        return Transformer(
            **keys,
            feed_forward=component(cfg.moe),
            activation_checkpointing=cfg.trainer.activation_checkpointing,
        )


def loader_of(cfg: Any, data: Any, parallelism: Parallelism, start: int) -> Loader:
    """Return the loader of this process's part of every batch from sequence `start` on."""
    sequences = data.train(cfg.model.max_seq_len, cfg.seed)
    with _memory_told(_step_advice(cfg)):
        return Loader(
            sequences,
            batch_size=cfg.trainer.batch_size,
            accumulation=cfg.trainer.gradient_accumulation_steps,
            rank=parallelism.rank,
            world_size=parallelism.world_size,
            start=start,
            device=parallelism.device,
            vocab_size=cfg.model.vocab_size or data.vocab_size,
            eot_id=_masked_id(cfg, data),
        )


def evaluator_of(cfg: Any, data: Any, parallelism: Parallelism, most: int | None) -> Evaluator:
    """Return the evaluator over the validation part; most: sequences of each source, or None."""
    return Evaluator(
        data.val(cfg.model.max_seq_len),
        parallelism=parallelism,
        seq_len=cfg.model.max_seq_len,
        batch_size=cfg.trainer.batch_size,
        max_sequences=most,
        eot_id=_masked_id(cfg, data),
    )


def loggers_of(cfg: Any) -> Loggers:
    """Return the loggers of the `logger` group by name; the local one is always among them."""
    parts = {"logger": cfg.logger} if "_target_" in cfg.logger else cfg.logger
    chosen: dict[str, Logger] = {str(name): component(part) for name, part in parts.items()}
    if not any(isinstance(logger, LocalLogger) for logger in chosen.values()):
        chosen = {"local": LocalLogger(), **chosen}
    return Loggers(chosen)


def _masked_id(cfg: Any, data: Any) -> int | None:
    """Return the id at which attention and targets stop, if they are to."""
    eot_id: int | None = data.eot_id
    return eot_id if cfg.data.document_masking else None


def describe(run: Run) -> str:
    """Return the derived quantities a person wants to see before the first step."""
    count = unwrap(run.model).count_parameters()
    trainer = run.cfg.trainer
    seq_len = run.cfg.model.max_seq_len
    lines = [
        f"run        {run.dir.path}",
        f"model      {count.total:,} parameters, {count.active:,} active a token",
        f"batch      {run.global_batch} sequences of {seq_len} = {run.global_batch * seq_len:,} "
        f"tokens a step ({trainer.batch_size} a process × {trainer.gradient_accumulation_steps} "
        f"micro-steps × {run.parallelism.world_size} processes)",
        f"training   {trainer.max_steps:,} steps = "
        f"{trainer.max_steps * run.global_batch * seq_len:,} tokens, {trainer.precision} on "
        f"{run.parallelism.device.type}",
    ]
    if run.precision.emulated:
        lines.append(
            f"note       this processor only emulates trainer.precision={trainer.precision}; "
            "fp32 is many times as fast here"
        )
    if run.state.step:
        lines.append(f"resumed    after step {run.state.step}")
    return "\n".join(lines)


def conclude(run: Run) -> str:
    """Return how the run ended, where its results are, and what to do with them."""
    folder = run.dir.path
    losses = [row["val/loss"] for row in read_rows(run.dir.metrics_path) if row.get("val/loss")]
    lines = []
    if losses:
        lines.append(
            f"validation {losses[-1]:.4f} nats a token (perplexity {math.exp(losses[-1]):.1f}), "
            f"from {losses[0]:.4f} at the start"
        )
    lines += [
        f"checkpoint {complete(run.dir.checkpoints)[0]}",
        f"plot       {folder / 'loss.png'}",
        f"next       lunaris evaluate {quote(str(folder))}",
    ]
    if run.dir.tokenizer_path.is_file():
        prompt = "def main(" if "stdlib" in run.cfg.data._target_ else "The"
        lines.append(f"           lunaris generate {quote(str(folder))} --prompt '{prompt}'")
    lines.append("           lunaris train -m moe.n_experts=4,8 trainer.max_steps=100")
    return "\n".join(lines)


def _meter(model: Transformer, parallelism: Parallelism, seq_len: int, global_batch: int) -> Meter:
    peak = peak_flops(parallelism.device)
    return Meter(
        tokens_per_step=global_batch * seq_len,
        flops_per_token=model.flops_per_token(seq_len),
        peak=peak and peak * parallelism.world_size,
    )


@contextmanager
def _held(run_dir: RunDir) -> Iterator[None]:
    """Hold the folder's lock on rank 0; every process learns when another job has it."""
    with ExitStack() as stack:
        distributed.on_rank_0(lambda: stack.enter_context(run_dir.lock()))
        yield


@contextmanager
def _recorded(run_dir: RunDir) -> Iterator[None]:
    """Keep status.json (rank 0): running now, then done, stopped or failed with the error."""
    if distributed.rank() != 0:
        yield
        return
    was_done = run_dir.read_status().get("state") == "done"
    attempts = run_dir.record_attempt(distributed.world_size())
    run_dir.write_status(
        state="running",
        attempts=attempts,
        last_error=None,
        job_id=current_job_id(),
    )
    try:
        yield
    except Stopped:
        run_dir.write_status(state="stopped")
        raise
    except BaseException as error:
        # What hinders a run that had ended, a folder that moved, say, takes nothing from it.
        state = "done" if was_done and isinstance(error, UserError) else "failed"
        run_dir.write_status(state=state, last_error=f"{type(error).__name__}: {error}")
        raise
    run_dir.write_status(state="done")


@contextmanager
def _memory_told(advice: str) -> Iterator[None]:
    """Say what to change where memory, the device's or the host's, is too small."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"out of memory {advice} ({reason})") from error


def _step_advice(cfg: Any) -> str:
    return (
        f"with trainer.batch_size={cfg.trainer.batch_size} and "
        f"model.max_seq_len={cfg.model.max_seq_len}; lower the first and raise "
        "trainer.gradient_accumulation_steps as much, or set trainer.activation_checkpointing=true"
    )
