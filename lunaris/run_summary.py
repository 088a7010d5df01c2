"""The lines that a run prints before its first step and after its last one."""

from __future__ import annotations

import math
from shlex import quote

from lunaris.console import labelled
from lunaris.metrics.records import read_rows
from lunaris.parallelism.base import unwrap
from lunaris.runs.checkpoint_files import complete
from lunaris.train import Run


def describe(run: Run) -> str:
    """Return the derived quantities that are printed before the first step."""
    count = unwrap(run.model).count_parameters()
    trainer = run.cfg.trainer
    seq_len = run.cfg.model.max_seq_len
    world = run.parallelism.data_world_size
    micro_steps, tokens = trainer.gradient_accumulation_steps, run.global_batch * seq_len
    lines = [
        labelled("run", str(run.dir.path)),
        labelled("model", f"{count.total:,} parameters, {count.active:,} active a token"),
        labelled(
            "batch",
            f"{run.global_batch:,} sequences of {seq_len:,} = {tokens:,} tokens a step",
        ),
        labelled(
            "", f"{trainer.batch_size} a process × {micro_steps} micro-steps × {world} processes"
        ),
        labelled(
            "training",
            f"{trainer.max_steps:,} steps = {trainer.max_steps * tokens:,} tokens, "
            f"{trainer.precision} on {run.parallelism.device.type}",
        ),
    ]
    if run.precision.emulated:
        text = f"this processor only emulates trainer.precision={trainer.precision}; fp32 is many "
        lines.append(labelled("note", f"{text}times as fast here"))
    if not run.evaluator.sources:
        text = "the data has no validation part of one sequence, so there is no val/loss; prepare "
        lines.append(labelled("note", f"{text}more text, or set data.val_dir or data.val_fraction"))
    if run.state.step:
        lines.append(labelled("resumed", f"after step {run.state.step:,}"))
    return "\n".join(lines)


def conclude(run: Run) -> str:
    """Return how the run ended, where its results are, and the commands to run next."""
    folder = run.dir.path
    losses = [row["val/loss"] for row in read_rows(run.dir.metrics_path) if row.get("val/loss")]
    lines = []
    if losses:
        last = f"{losses[-1]:.4f} nats a token (perplexity {math.exp(losses[-1]):.1f})"
        lines.append(labelled("validation", f"{last}, from {losses[0]:.4f} at the start"))
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
