"""Signals that ask a run to stop: recorded when they arrive, obeyed soon after a step or batch."""

from __future__ import annotations

import atexit
import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Self

from lunaris.errors import Stopped

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@functools.cache
def _ignore_at_exit() -> None:
    """Ignore the signals once the interpreter ends, which takes a while after torch was used."""

    def ignore() -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    atexit.register(ignore)


class _Leave(BaseException):
    """Raised by the handler within `at_once`: no `except Exception` on its way may swallow it."""


def saving(received: signal.Signals, processes: int = 1) -> str:
    """Return what a run of so many processes does at its first signal, in words."""
    soon = "after this step" if processes == 1 else "within two steps"
    if received is signal.SIGINT:
        return f"saving {soon}; again to stop at once"
    return f"{received.name}: saving {soon}"


class StopSignal:
    """Records SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 while its context is open.

    SLURM sends SIGTERM at preemption and the signal of `--signal` (SIGUSR2, at some sites SIGUSR1)
    before the time limit.
    A second SIGINT raises KeyboardInterrupt at once. A nested StopSignal starts with the signal
    that the outer one has received. While the interpreter ends, the signals are ignored: the work
    is done, and a process that one of them killed would look as if it had failed.
    """

    def __init__(self, announce: Callable[[str], None] | None = None, processes: int = 1) -> None:
        """announce: is called with words for the person when the first signal arrives.

        processes: of the run, which must agree before they save.
        """
        self.received: signal.Signals | None = None
        self._processes = processes
        self._announce = announce
        self._before: dict[signal.Signals, object] = {}
        # What goes on where a signal ends the process at once, or None.
        self._phase: str | None = None

    def __enter__(self) -> Self:
        _ignore_at_exit()
        for number in _STOP_SIGNALS:
            self._before[number] = before = signal.signal(number, self._record)
            outer = getattr(before, "__self__", None)
            if isinstance(outer, StopSignal):
                self.received = self.received or outer.received
        # The script of a job blocks them until here, so that none is lost while python starts.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name of the signal, or words for one that only another process received."""
        return self.received.name if self.received else "a signal to another process"

    @contextmanager
    def at_once(self, phase: str) -> Iterator[None]:
        """Let a signal raise Stopped from within this context, where nothing would be lost.

        phase: what the process does there, in words. For a process without others, which would
        wait for it.
        """
        self._phase = phase
        try:
            self._obey()
            yield
            self._phase = None
        except _Leave as left:
            raise Stopped(str(left)) from None
        finally:
            self._phase = None

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.received is None
        self.received = signal.Signals(number)
        self._obey()
        if first and self._announce is not None:
            # A thread, because this handler may have interrupted a write to the same stream.
            words = saving(self.received, self._processes)
            Thread(target=self._announce, args=(words,), daemon=True).start()

    def _obey(self) -> None:
        if self._phase is not None and self.received is not None:
            phase, self._phase = self._phase, None
            raise _Leave(f"stopped by {self.received.name} while {phase}")
