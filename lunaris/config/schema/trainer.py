"""The schemas of the training loop and of checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import free
from lunaris.config.schema.checks import above_zero, one_of, within


@dataclass
class TrainerConfig:
    """The training loop. `batch_size` counts sequences per process and micro-step.

    Of batch size, accumulation and processes only the product decides the numbers of a run.
    """

    max_steps: int = 300
    batch_size: int = free(16)
    gradient_accumulation_steps: int = free(1)
    # Global gradient norm; null: no clipping.
    grad_clip: float | None = 1.0
    precision: str = "fp32"
    compile_model: bool = free(False)
    activation_checkpointing: bool = free(False)
    log_interval: int = free(10)
    # Null: evaluate at the last step only.
    eval_interval: int | None = free(100)
    # Validation batches of `batch_size` sequences a process; null: the whole validation part.
    eval_steps: int | None = free(10)
    # cpu, cuda, or null: cuda where there is one.
    device: str | None = free(None)

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_interval",
                    "eval_interval", "eval_steps"):  # fmt: skip
            within(f"trainer.{key}", getattr(self, key), low=1)
        above_zero("trainer.grad_clip", self.grad_clip)
        one_of("trainer.precision", self.precision, ("bf16", "fp16", "fp32"))
        if self.device is not None:
            one_of("trainer.device", self.device, ("cpu", "cuda"))


@dataclass
class CheckpointConfig:
    """When to save and what to keep; the last step is always saved."""

    save_interval: int = 100
    # Newest checkpoints kept; null: all.
    keep_last: int | None = 3
    async_save: bool = False
    # At the end, also write the weights as one `model.pt`.
    consolidated: bool = False

    def __post_init__(self) -> None:
        within("checkpoint.save_interval", self.save_interval, low=1)
        within("checkpoint.keep_last", self.keep_last, low=1)
