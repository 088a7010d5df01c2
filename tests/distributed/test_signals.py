from __future__ import annotations

import os
import signal

import pytest

from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_noted_and_the_handler_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with StopSignal(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_no_handler_of_errors_swallows_a_signal_that_is_obeyed_at_once() -> None:
    """A custom class that is imported while the model is built may catch what it meets."""
    with StopSignal() as stop:
        with pytest.raises(Stopped, match="^stopped by SIGINT while building$"):
            with stop.at_once("building"):
                try:
                    signal.raise_signal(signal.SIGINT)
                except Exception as error:
                    raise ValueError from error
        # A signal that came before is obeyed too, and after the context it is only recorded.
        with pytest.raises(Stopped), stop.at_once("building again"):
            pass
        signal.raise_signal(signal.SIGTERM)
