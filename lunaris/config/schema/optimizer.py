"""The schemas of the optimizers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.base import Component, changeable
from lunaris.errors import UserError


@dataclass
class OptimizerConfig(Component):
    """What updates the weights."""

    _group_ = "optimizer"


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101); decay on matrices and stacked experts, not on norms."""

    _target_: str = "lunaris.optim.adamw.build_adamw"
    # At the peak of the schedule.
    learning_rate: float = changeable(3e-3, above=0)
    # Decoupled: times the learning rate.
    weight_decay: float = changeable(0.1, low=0)
    # Decay of the running mean of gradients and of their squares.
    betas: tuple[float, float] = changeable((0.9, 0.95))
    # Added to the root of the mean square.
    eps: float = changeable(1e-8, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        # An interpolation may give anything.
        given = list(self.betas) if isinstance(self.betas, list | tuple) else self.betas
        if not isinstance(given, list) or len(given) != 2:
            raise UserError(f"optimizer.betas={given}: must be a list of 2 numbers")
        self.betas = (self.betas[0], self.betas[1])  # A list where a file gave it.
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserError(f"optimizer.betas={list(self.betas)}: each must be in [0, 1)")


@dataclass
class MuonConfig(AdamWConfig):
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and routers."""

    _target_: str = "lunaris.optim.muon.build_muon"
    # At the peak of the schedule.
    learning_rate: float = changeable(6e-3, above=0)
    # Of the matrices that Muon updates.
    momentum: float = changeable(0.95, low=0.0, high=0.9999)
    # Of the momentum: by the best polynomial of each iteration (arXiv 2505.16932), or by one.
    orthogonalization: str = changeable("polar_express", allowed=("polar_express", "newton_schulz"))
    # Iterations of an update; newton_schulz needs about 5.
    ns_steps: int = changeable(3, low=1)
