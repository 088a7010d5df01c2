"""The schemas of the training loop and of checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Schema, changeable, free, key


@dataclass
class TrainerConfig(Schema):
    """The training loop. `batch_size` counts sequences per process and micro-step.

    Of batch size, accumulation and processes only the product decides the numbers of a run.
    """

    _group_ = "trainer"
    max_steps: int = changeable(300, low=1)
    batch_size: int = free(16, low=1)
    gradient_accumulation_steps: int = free(1, low=1)
    # Global gradient norm; null: no clipping.
    grad_clip: float | None = changeable(1.0, above=0)
    precision: str = changeable("fp32", allowed=("bf16", "fp16", "fp32"))
    compile_model: bool = free(False)
    activation_checkpointing: bool = free(False)
    # Steps between rows of metrics; a row's losses are means over these steps.
    log_interval: int = free(10, low=1)
    # Null: evaluate at the last step only.
    eval_interval: int | None = free(100, low=1)
    # Validation batches of `batch_size` sequences a process; null: the whole validation part.
    eval_steps: int | None = free(10, low=1)
    # A step whose loss or gradients are not finite is skipped; so many in a row stop the run.
    max_skipped_steps: int = free(20, low=1)
    # An outlier, so many standard deviations above the mean loss or gradient norm of the last
    # `spike_window` steps, is counted as a spike.
    spike_threshold: float = changeable(6.0, above=0)
    spike_window: int = changeable(128, low=8, high=1 << 16)
    # Skip spikes too.
    skip_spikes: bool = changeable(False)
    # Null: cuda where there is one.
    device: str | None = free(None, allowed=("cpu", "cuda"))


@dataclass
class CheckpointConfig(Schema):
    """When to save and what to keep; the last step is always saved."""

    _group_ = "checkpoint"
    save_interval: int = key(100, low=1)
    # Newest checkpoints kept; null: all.
    keep_last: int | None = key(3, low=1)
    async_save: bool = False
    # What a run does when a checkpoint cannot be written, because the disk is full say. The last
    # one always stops it.
    on_error: str = free("stop", allowed=("stop", "continue"))
    # At the end, also write the weights as one `model.pt`.
    consolidated: bool = False
