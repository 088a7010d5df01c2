"""A complete model in one process."""

from __future__ import annotations

from torch import nn

from lunaris.parallelism.base import Parallelism, compile_blocks, materialize
from lunaris.precision import Precision


class Single(Parallelism):
    """No parallelism: one process has the complete model."""

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Allocate the model on the device and draw its weights."""
        assert self.world_size == 1, "parallelism=single runs in one process"
        materialize(model, self.device, seed)
        if compile:
            compile_blocks(model)
        return model
