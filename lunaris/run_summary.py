"""The lines that a run prints before its first step and after its last one."""

from __future__ import annotations

import math
from shlex import quote

import numpy as np
import torch
from torch import nn

from lunaris.config.frozen import to_tree
from lunaris.config.trust import flags_for
from lunaris.console import labelled
from lunaris.metrics.records import read_rows
from lunaris.model.feed_forward import RoutedFeedForward
from lunaris.model.transformer import Transformer
from lunaris.moe.experts import Experts, describe_product
from lunaris.moe.factory import DenseFactory
from lunaris.parallelism.base import unwrap
from lunaris.runs.checkpoint_files import complete
from lunaris.train import Run

# Of the prompt that is proposed after a run.
_PROMPT_SEQUENCES, _PROMPT_TOKENS, _PROMPT_WORDS = 16, 256, 3


def describe(run: Run) -> str:
    """Return the derived quantities that are printed before the first step."""
    count = unwrap(run.model).count_parameters()
    trainer = run.cfg.trainer
    seq_len = run.cfg.model.max_seq_len
    micro_steps, tokens = trainer.gradient_accumulation_steps, run.global_batch * seq_len
    lines = [
        labelled("run", str(run.dir.path)),
        labelled("model", f"{count.total:,} parameters, {count.active:,} active a token"),
        *_twin(unwrap(run.model)),
        *_parametrization(run),
        labelled(
            "batch",
            f"{run.global_batch:,} sequences of {seq_len:,} = {tokens:,} tokens a step",
        ),
        labelled(
            "", f"{trainer.batch_size} a process × {micro_steps} micro-steps × {_processes(run)}"
        ),
        labelled(
            "training",
            f"{trainer.max_steps:,} steps = {trainer.max_steps * tokens:,} tokens, "
            f"{run.precision.name} on {run.parallelism.device.type}",
        ),
    ]
    for module in unwrap(run.model).modules():
        if isinstance(module, Experts):
            taken = (run.parallelism.device, run.precision.dtype, module.gate_up, module.down)
            lines.append(labelled("experts", describe_product(*taken)))
            break  # All layers have experts of one size.
    if run.state.step < trainer.end() < trainer.max_steps:
        lines.append(labelled("pauses", f"after step {trainer.end():,} (trainer.stop_at)"))
    if run.precision.emulated:
        text = f"this processor only emulates trainer.precision={run.precision.name}; fp32 is many "
        lines.append(labelled("note", f"{text}times as fast here"))
    if not run.evaluator.sources:
        text = "the data has no validation part of one sequence, so there is no val/loss; prepare "
        lines.append(labelled("note", f"{text}more text, or set data.val_dir or data.val_fraction"))
    if run.state.step:
        lines.append(labelled("resumed", f"after step {run.state.step:,}"))
    return "\n".join(lines)


def _processes(run: Run) -> str:
    """Return the number of processes with data of their own, and what joins several."""
    count = run.parallelism.data_world_size
    joined = type(run.parallelism).__name__.lower() if run.parallelism.world_size > 1 else ""
    return f"{count} processes" + (f" ({joined})" if joined else "")


def _twin(model: Transformer) -> list[str]:
    """Return a line that compares a model of experts with the same one of `moe=none`."""
    routed = [module for module in model.modules() if isinstance(module, RoutedFeedForward)]
    if not routed:
        return []
    with torch.device("meta"):
        feed_forward = DenseFactory()(0, model.shape)
    of_layers = len(routed) * _size(feed_forward) - sum(_size(module) for module in routed)
    count = model.count_parameters()
    dense = count.total + of_layers
    return [labelled("", f"{count.active / dense:.2f} of its dense twin's {dense:,} (moe=none)")]


def _parametrization(run: Run) -> list[str]:
    """Return a line on what the width of the model changes, unless nothing."""
    model = run.cfg.model
    if model.parametrization == "standard":
        return []
    factors = model.width_factors()
    rates = {f"{group['peak_lr']:.3g}" for group in run.optimizer.param_groups}
    return [
        labelled(
            "mup",
            f"{factors.width:g} times the base width of {model.mup_base_width:,}; logits times "
            f"{factors.logits:.3g}, attention scores times {factors.scores:.3g}; learning rates "
            f"{', '.join(sorted(rates, key=float))}",
        )
    ]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def write_parameters(run: Run) -> None:
    """Write the numbers of parameters to `status.json`, for reports, which build no model."""
    if run.parallelism.is_writer:
        count = unwrap(run.model).count_parameters()
        run.dir.write_status(parameters=count.total, active_parameters=count.active)


def conclude(run: Run) -> str:
    """Return how the run ended, where its results are, and the commands to run next."""
    folder = quote(str(run.dir.path))
    # A later command runs custom classes only where it is told to.
    trust = "".join(f" {word}" for word in flags_for(to_tree(run.cfg)))
    trainer, paused = run.cfg.trainer, run.state.step < run.cfg.trainer.max_steps
    losses = [row["val/loss"] for row in read_rows(run.dir.metrics_path) if row.get("val/loss")]
    lines = []
    if paused:
        at = f"after step {run.state.step:,} of {trainer.max_steps:,} (trainer.stop_at)"
        lines.append(labelled("paused", at))
    if losses:
        last = f"{losses[-1]:.4f} nats a token (perplexity {math.exp(losses[-1]):.1f})"
        lines.append(labelled("validation", f"{last}, from {losses[0]:.4f} at the start"))
    lines += [
        f"checkpoint {complete(run.dir.checkpoints)[0]}",
        f"plot       {run.dir.path / 'loss.png'}",
        f"next       lunaris evaluate {folder}{trust}",
    ]
    if run.dir.tokenizer_path.is_file():
        command = f"lunaris generate {folder} --prompt {quote(_prompt(run))}{trust}"
        lines.append(f"           {command}")
    longer = "trainer.stop_at=null" if paused else f"trainer.max_steps={2 * trainer.max_steps}"
    lines += [
        f"           lunaris report {folder}",
        f"           lunaris resume {folder} {longer}{trust}",
    ]
    return "\n".join(lines)


def _prompt(run: Run) -> str:
    """Return the first words of a line of the validation text; `The` where there are none."""
    # Imported here: only this line of a whole run needs it.
    from tokenizers import Tokenizer

    for source in run.evaluator.sources.values():
        ids = np.zeros((_PROMPT_SEQUENCES, source.seq_len + 1), np.int64)
        source.gather(len(source) // 2 + np.arange(_PROMPT_SEQUENCES), ids)
        # A target without loss is written as ~t.
        rows = np.where(ids < 0, ~ids, ids)[:, :_PROMPT_TOKENS].tolist()
        for text in Tokenizer.from_file(str(run.dir.tokenizer_path)).decode_batch(rows):
            # The first line may begin within a word.
            for line in text.splitlines()[1:]:
                if line.isprintable() and line[:1].isalpha():
                    return " ".join(line.split()[:_PROMPT_WORDS])
    return "The"
