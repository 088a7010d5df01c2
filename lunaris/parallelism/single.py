"""A complete model in one process."""

from __future__ import annotations

from lunaris.parallelism.base import Parallelism


class Single(Parallelism):
    """No parallelism: one process has the complete model."""

    def __init__(self) -> None:
        super().__init__()
        assert self.world_size == 1, "parallelism=single runs in one process"
