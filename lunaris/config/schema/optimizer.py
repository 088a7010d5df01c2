"""The schemas of the optimizers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component
from lunaris.config.schema.checks import above_zero, within
from lunaris.errors import UserError


@dataclass
class OptimizerConfig(Component):
    """What updates the weights."""


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101); decay on matrices and stacked experts, not on norms."""

    _target_: str = "lunaris.optim.adamw.build_adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        above_zero("optimizer.learning_rate", self.learning_rate)
        within("optimizer.weight_decay", self.weight_decay, low=0)
        above_zero("optimizer.eps", self.eps)
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas={list(self.betas)}: must be a list of 2 numbers")
        self.betas = (self.betas[0], self.betas[1])  # A list where a file gave it.
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserError(f"optimizer.betas={list(self.betas)}: each must be in [0, 1)")


@dataclass
class MuonConfig(AdamWConfig):
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and routers."""

    _target_: str = "lunaris.optim.muon.build_muon"
    momentum: float = 0.95
    ns_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        within("optimizer.momentum", self.momentum, 0.0, 0.9999)
        within("optimizer.ns_steps", self.ns_steps, low=1)
