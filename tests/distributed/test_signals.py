from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time

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


@pytest.mark.parametrize(
    ("number", "processes", "words"),
    [
        (signal.SIGINT, 1, "saving after this step; again to stop at once"),
        (signal.SIGTERM, 1, "SIGTERM: saving after this step"),
        (signal.SIGTERM, 2, "SIGTERM: saving within two steps"),
    ],
)
def test_the_first_signal_is_announced_once(
    number: signal.Signals, processes: int, words: str
) -> None:
    heard: queue.Queue[str] = queue.Queue()
    with StopSignal(announce=heard.put) as stop:
        with pytest.raises(Stopped), stop.at_once("building"):
            os.kill(os.getpid(), number)
    assert heard.empty()  # It ends at once, which needs no announcement.
    with StopSignal(announce=heard.put, processes=processes):
        os.kill(os.getpid(), number)
        assert heard.get(timeout=10) == words
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    assert heard.empty()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_a_process_that_has_done_its_work_changes_nothing(
    number: signal.Signals,
) -> None:
    """What is registered first is called last at the end of the interpreter."""
    script = (
        "import atexit, os; "
        f"atexit.register(lambda: os.kill(os.getpid(), {int(number)})); "
        "from lunaris.distributed.signals import StopSignal\n"
        "with StopSignal(): pass"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
