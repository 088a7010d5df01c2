"""Signals that ask a run to stop: noted when they come, acted on at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

_ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR2 while in its context; a second SIGINT interrupts at once.

    SLURM sends SIGTERM at preemption and the signal of `--signal` (SIGUSR2) before the time limit.
    One within another's context begins with what that has noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in _ASK_TO_STOP:
            self._before[number] = before = signal.signal(number, self._note)
            outer = getattr(before, "__self__", None)
            if isinstance(outer, StopSignal):
                self.received = self.received or outer.received
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
