"""Signals that ask a run to stop: recorded when they arrive, obeyed at the end of a step."""

from __future__ import annotations

import signal
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignal:
    """Records SIGTERM, SIGINT and SIGUSR2 while its context is open.

    SLURM sends SIGTERM at preemption and the signal of `--signal` (SIGUSR2) before the time limit.
    A second SIGINT raises KeyboardInterrupt at once. A nested StopSignal starts with the signal
    that the outer one has received.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in _STOP_SIGNALS:
            self._before[number] = before = signal.signal(number, self._record)
            outer = getattr(before, "__self__", None)
            if isinstance(outer, StopSignal):
                self.received = self.received or outer.received
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
