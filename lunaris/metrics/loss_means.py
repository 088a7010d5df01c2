"""The training losses of a row: their means over the steps since the row before it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lunaris.metrics.records import Row


class LossMeans:
    """Sums the losses of steps on the device, so that no step waits for the host.

    The sums are float64 and those of the global batch, so every process has the same ones. A
    checkpoint between two rows holds them: a resumed run logs the means of one that never stopped.
    """

    def __init__(self, device: torch.device, saved: dict[str, Any] | None = None) -> None:
        """saved: what `state_dict` returned; empty in checkpoints of older versions."""
        saved = saved or {"steps": 0, "sums": {}}
        self._device = device
        self._begin(list(saved["sums"]), [saved["steps"], *saved["sums"].values()])

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor], skip: Tensor) -> None:
        """Add the losses of a step, each [], unless `skip` ([] float32) is 1."""
        if [*losses] != self._names:  # The first step, or the first with another objective.
            self._begin([*losses], [0.0] * (1 + len(losses)))
        ones = torch.ones((), dtype=torch.float64, device=self._device)
        values = torch.stack([ones, *(loss.double() for loss in losses.values())])
        self._sums += torch.where(skip.bool(), 0.0, values)

    def row(self, *, begin_again: bool) -> Row:
        """Return each loss as `train/NAME`, and `train/perplexity` of the mean main loss.

        The values are not finite where every step was skipped. Waits for the device. begin_again:
        whether the next row leaves these steps out. It does after a row of the interval, and not
        after one that a run writes only because it ends.
        """
        steps, *sums = self._sums.tolist()
        means = [total / steps if steps else math.nan for total in sums]
        row = {f"train/{name}": mean for name, mean in zip(self._names, means, strict=True)}
        if "main_loss" in self._names:
            row["train/perplexity"] = math.exp(min(row["train/main_loss"], 700.0))
        if begin_again:
            self._sums.zero_()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last row, for a checkpoint; waits for the device."""
        steps, *sums = self._sums.tolist()
        return {"steps": steps, "sums": dict(zip(self._names, sums, strict=True))}

    def _begin(self, names: list[str], sums: list[float]) -> None:
        self._names = names
        # The number of steps, then the sum of each loss.
        self._sums = torch.tensor(sums, dtype=torch.float64, device=self._device)
