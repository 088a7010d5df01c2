"""The schemas of the training loop and of checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lunaris.config.schema.base import FREE, Schema, changeable, free, key
from lunaris.errors import UserError

# The value of a key that the device on which a run first trains decides.
AUTO = "auto"

_MOST_PROFILED = 20


@dataclass
class TrainerConfig(Schema):
    """The training loop. `batch_size` counts sequences per process and micro-step.

    Of batch size, accumulation and processes only the product decides the numbers of a run.
    """

    _group_ = "trainer"
    # Optimizer steps of the run.
    max_steps: int = changeable(600, low=1)
    # Pause after this step, with a checkpoint saved and the schedule of `max_steps`; null: do not.
    stop_at: int | None = free(None, low=1)
    # Sequences of a micro-step in each process.
    batch_size: int = free(8, low=1)
    # Micro-steps of a step; their gradients are averaged.
    gradient_accumulation_steps: int = free(1, low=1)
    # Global gradient norm; null: no clipping.
    grad_clip: float | None = changeable(1.0, above=0)
    # Of activations and products; weights and optimizer state are float32. Auto: bf16 on a GPU that
    # computes it, else fp32; what the run has chosen when it first trains stays its precision.
    precision: str = changeable(AUTO, allowed=(AUTO, "bf16", "fp16", "fp32"))
    # Compile each block with torch.compile.
    compile_model: bool = free(False)
    # Activations that the backward pass computes again instead of keeping them: full, all but the
    # input of each block; selective, all but that and the outputs of matrix products and attention.
    activation_checkpointing: str = free("none", allowed=("none", "selective", "full"))
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
    # Steps that a spike is compared with.
    spike_window: int = changeable(128, low=8, high=1 << 16)
    # Skip spikes too.
    skip_spikes: bool = changeable(False)
    # Null: cuda where there is one.
    device: str | None = free(None, allowed=("cpu", "cuda"))
    # First and last step to record with torch's profiler, into the folder `profile` of the run.
    profile_steps: list[int] = field(default_factory=list, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= self.max_steps):
            fault = f"must be two steps, the first and the last, between 1 and {self.max_steps}"
            raise UserError(f"trainer.profile_steps={steps}: {fault} (trainer.max_steps), or []")
        if steps and steps[1] - steps[0] >= _MOST_PROFILED:
            fault = f"must be at most {_MOST_PROFILED} steps, whose events are kept in memory"
            raise UserError(f"trainer.profile_steps={steps}: {fault}")

    def likely_precision(self, *, gpu: bool) -> str:
        """Return the precision that a run will have; `auto` taken as decided by a recent GPU."""
        if self.precision != AUTO:
            return self.precision
        return "bf16" if gpu else "fp32"

    def half(self) -> bool:
        """Return whether products run in half precision; before `auto` is decided, False."""
        return self.precision in ("bf16", "fp16")

    def end(self) -> int:
        """Return the step after which the processes of the run end: paused, or done."""
        return min(self.max_steps, self.stop_at or self.max_steps)


@dataclass
class CheckpointConfig(Schema):
    """When to save and what to keep; the last step is always saved."""

    _group_ = "checkpoint"
    # Steps between checkpoints.
    save_interval: int = key(100, low=1)
    # Newest checkpoints kept; null: all.
    keep_last: int | None = key(3, low=1)
    # Write checkpoints in the background.
    async_save: bool = False
    # What a run does when a checkpoint cannot be written, because the disk is full say. The last
    # one always stops it.
    on_error: str = free("stop", allowed=("stop", "continue"))
    # At the end, also write the weights as one `model.pt`.
    consolidated: bool = False
