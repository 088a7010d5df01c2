"""Decides before each optimizer step, on the device, whether the step is taken.

A step whose loss or gradient norm is not finite is skipped: weights, optimizer state and balancing
keep their bits. The host learns of it one step later, so that it never waits for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from lunaris.errors import RunFailed
from lunaris.late import Late
from lunaris.torch_internals import takes_found_inf

_TAKEN, _SPIKE, _NOT_FINITE = 0, 1, 2


@dataclass(frozen=True)
class StepRange:
    """A step (counted from 1) and the first and last sequence of its global batch."""

    step: int
    first: int
    last: int


@dataclass(frozen=True)
class Event:
    """A step that was skipped or whose loss or gradient norm is an outlier."""

    at: StepRange
    finite: bool
    skipped: bool

    def __str__(self) -> str:
        what = "an outlier (trainer.spike_threshold)" if self.finite else "not finite"
        return (
            f"step {self.at.step}{' is skipped' if self.skipped else ''}: its loss or gradient "
            f"norm is {what}; sequences {self.at.first} to {self.at.last}"
        )


class StepGuard:
    """Judges every step by its loss and gradient norm, and counts those that are skipped.

    A value is an outlier when it lies more than `threshold` standard deviations above the mean of
    the last `window` steps (a z-score); at least half of a window must be known. Such steps are
    counted as spikes, and with `skip_spikes` skipped too. Every process gets the same values and
    so decides alike.
    """

    def __init__(
        self,
        *,
        max_skipped_steps: int,
        skip_spikes: bool,
        window: int,
        threshold: float,
        device: torch.device,
        run: str,
    ) -> None:
        """run: the folder that the advice of a stopped run names."""
        self.skipped = self.spikes = 0
        self._in_row = 0
        # The first sequence of the steps that were skipped in a row.
        self._first = 0
        self._max = max_skipped_steps
        self._skip_from = _SPIKE if skip_spikes else _NOT_FINITE
        self._threshold = threshold
        # [2, W] float64: the losses and gradient norms of the last steps, NaN where unknown.
        self._window = torch.full((2, window), torch.nan, dtype=torch.float64, device=device)
        self._run = run
        self._pending: deque[tuple[StepRange, Late]] = deque()

    @torch.no_grad()
    def judge(self, at: StepRange, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return [] float32: 1 where the step is to be skipped, 0 where it is taken.

        loss, grad_norm: [] float64 on the device, the same in every process.
        """
        values = torch.stack([loss, grad_norm])
        finite = values.isfinite().all()
        known = self._window.isfinite()
        count = known.sum(dim=1)
        mean = self._window.nanmean(dim=1)
        spread = (self._window - mean[:, None]).square().nanmean(dim=1).sqrt()
        # Values that hardly differ would make the rounding of the next one an outlier.
        spread = torch.maximum(spread, 1e-3 * mean.abs())
        outlier = (values > mean + self._threshold * spread) & (2 * count >= self._window.size(1))
        code = torch.where(finite, outlier.any().long() * _SPIKE, _NOT_FINITE)
        self._window[:, at.step % self._window.size(1)] = values.where(finite, torch.nan)
        self._pending.append((at, Late(code)))
        return (code >= self._skip_from).float()

    def settle(self, lag: int = 0) -> Iterator[Event]:
        """Yield the events of the steps judged so far, but of the last `lag` ones.

        With lag 1 this waits at most for the step before the last one judged. Raises RunFailed when
        `max_skipped_steps` steps in a row were skipped.
        """
        while len(self._pending) > lag:
            at, late = self._pending.popleft()
            code = late.read()
            skipped = code >= self._skip_from
            event = Event(at, code != _NOT_FINITE, skipped)
            if code != _TAKEN:
                yield event
            self.skipped += skipped
            self.spikes += code == _SPIKE
            self._first = self._first if self._in_row else at.first
            self._in_row = self._in_row + 1 if skipped else 0
            if self._in_row >= self._max:
                raise RunFailed(self._advice(event))

    def _advice(self, last: Event) -> str:
        return (
            f"trainer.max_skipped_steps={self._max}: so many steps in a row were skipped, the last "
            f"of them step {last.at.step}, whose loss or gradient norm is "
            f"{'an outlier' if last.finite else 'not finite'}. Their sequences are {self._first} "
            f"to {last.at.last}; `lunaris resume {quote(self._run)} --skip-sequences "
            f"{self._first}-{last.at.last}` trains without them. Where the data is not the cause, "
            f"lower the rate: `lunaris resume {quote(self._run)} optimizer.learning_rate=…`, or "
            "set trainer.grad_clip in the same way. The last checkpoint is kept"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide and count as this one; waits for the device."""
        window = [[None if v != v else v for v in row] for row in self._window.tolist()]
        return {
            "skipped": self.skipped,
            "in_row": self._in_row,
            "first": self._first,
            "spikes": self.spikes,
            "window": window,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a window of another size starts empty."""
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self._in_row, self._first = state["in_row"], state["first"]
        rows = [[torch.nan if v is None else v for v in row] for row in state["window"]]
        window = torch.tensor(rows, dtype=torch.float64)
        if window.shape == self._window.shape:
            self._window.copy_(window)


def take_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Let `optimizer` take its step unless `skip` ([] float32) is 1, which changes no bit.

    An optimizer that takes `found_inf` (torch's fused ones, Muon) decides on the device. For any
    other one the host reads `skip`, and so waits for the device once a step.
    """
    if takes_found_inf(optimizer):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.found_inf = None  # type: ignore[attr-defined]
    elif not skip.item():
        optimizer.step()


@torch.no_grad()
def restore_where(skip: Tensor, values: Iterable[Tensor], saved: Iterable[Tensor]) -> None:
    """Set each of `values` back to its saved copy, in place, where `skip` ([] float32) is 1."""
    for value, before in zip(values, saved, strict=True):
        value.copy_(torch.where(skip.bool(), before, value))
