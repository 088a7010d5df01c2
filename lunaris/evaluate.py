"""The validation loss over held-out sequences, for each source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import nn

from lunaris.data.base import Sequences, is_masked
from lunaris.data.loader import IGNORED, check_ids, to_batch
from lunaris.distributed import session
from lunaris.distributed.collectives import any_rank
from lunaris.metrics.churn import RoutingChurn
from lunaris.objective.base import Objective
from lunaris.parallelism.base import Parallelism, unwrap


class EvaluationStopped(Exception):
    """The run is asked to stop, and the evaluation is not finished."""


@dataclass(frozen=True)
class Evaluator:
    """Computes the mean main loss of an objective over sequences spaced evenly in each source.

    The number of processes does not change which sequences count, so the loss is the same at every
    world size to float tolerance.
    """

    sources: dict[str, Sequences]
    _: KW_ONLY
    objective: Objective
    parallelism: Parallelism
    seq_len: int
    batch_size: int
    # Of each source; None takes all.
    max_sequences: int | None
    # None without document masking.
    eot_id: int | None
    # Whether this process is asked to stop.
    stopped: Callable[[], bool] = lambda: False
    churn: RoutingChurn = field(default_factory=RoutingChurn)

    @session.evaluation()
    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return `val/loss` and `val/perplexity`, and `val/SOURCE/loss` where there are several.

        From the second evaluation on, also `moe/layer_NN/churn` of each routed layer.

        Every process calls this. Losses are in nats a token; `val/loss` weighs each source by its
        full length, also when only some of its sequences are evaluated. Empty when there is no
        validation part. Raises EvaluationStopped in every process before the next batch once any
        process is asked to stop.
        """
        if not self.sources:
            return {}
        model.eval()
        totals = {
            name: self._total(model, source, watched=number == 0)
            for number, (name, source) in enumerate(self.sources.items())
        }
        scale = {name: len(part) / self._count(part) for name, part in self.sources.items()}
        row = {}
        if len(totals) > 1:
            row = {f"val/{name}/loss": t[0] / max(t[1], 1) for name, t in totals.items()}
        sums = [sum(scale[name] * t[i] for name, t in totals.items()) for i in (0, 1)]
        loss = sums[0] / max(sums[1], 1)
        row = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))} | row
        return row | self.churn.row(unwrap(model).moe_layers())

    def _count(self, source: Sequences) -> int:
        return len(source) if self.max_sequences is None else min(self.max_sequences, len(source))

    def _total(self, model: nn.Module, source: Sequences, *, watched: bool) -> list[float]:
        """Return [summed loss, number of targets] of one source over all data ranks."""
        size, parallelism = self.batch_size, self.parallelism
        rank, world = parallelism.data_rank, parallelism.data_world_size
        count = self._count(source)
        device = parallelism.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        # Every process takes the same number of rounds, since sharded models exchange weights in
        # each. A row past the end repeats the last sequence and has no targets.
        for first in range(0, count, size * world):
            if any_rank(self.stopped()):
                raise EvaluationStopped
            wanted = np.arange(first + rank * size, first + (rank + 1) * size)
            rows = np.empty((size, self.seq_len + 1), dtype=np.int64)
            picked = np.minimum(wanted, count - 1) * len(source) // count
            source.gather(picked, rows)
            check_ids(rows, picked, source, unwrap(model).vocab_size)
            batch = to_batch(torch.from_numpy(rows), self.eot_id, is_masked(source))
            batch["targets"][torch.from_numpy(wanted >= count)] = IGNORED
            batch = {name: part.to(device) for name, part in batch.items()}
            out = self.objective(model, batch)
            if watched and first == 0:
                self.churn.watch(out.experts)
            main = out.losses["main"].value
            n_targets = self.objective.count_targets(batch)
            total += torch.stack([main.double() * n_targets, n_targets.double()])
        return parallelism.sum(total).tolist()
