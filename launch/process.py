"""Training in this process, as one rank of a run, with its log."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lunaris.config.schema.root import Config
from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped, UserError
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    from lunaris.run import RunResult


def train_here(cfg: Config, path: Path) -> RunResult:
    """Train as this process of the run in folder `path` and return how the run ended.

    The output of the process and the traceback of the error that ends it are written to
    `logs/rank_K.log`; rank 0 prints to the console too. Raises what `lunaris.run.execute` raises.
    """
    rank = os.environ.get("RANK", "0")
    log_path = RunDir(path).logs / f"rank_{rank}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    also_console = rank == "0"
    with log_path.open("a", buffering=1) as log, _logged(log, also_console), StopSignal():
        try:
            from lunaris.run import execute

            return execute(cfg, path)
        except BaseException as error:
            _record(error)
            if isinstance(error, UserError | Stopped):
                print(f"{type(error).__name__}: {error}", file=log)
            else:
                traceback.print_exc(file=sys.stderr)
            raise


def exit_code_here(cfg: Config, path: Path) -> int:
    """Train as `train_here` does and return the exit code. Raises UserError and Stopped."""
    try:
        train_here(cfg, path)
    except (UserError, Stopped):
        raise
    except Exception:  # `train_here` has printed its traceback.
        return 1
    return 0


def _record(error: BaseException) -> None:
    from lunaris.distributed.heartbeat import record_failure

    expected = isinstance(error, UserError | Stopped)
    record_failure(str(error) if expected else f"{type(error).__name__}: {error}")


@contextmanager
def _logged(log: TextIO, also_console: bool) -> Iterator[None]:
    """Send the output of this process to the log, and to the console too if asked to."""
    with ExitStack() as stack:
        if also_console:
            stack.enter_context(redirect_stdout(_Tee(sys.stdout, log)))  # type: ignore[type-var]
            stack.enter_context(redirect_stderr(_Tee(sys.stderr, log)))  # type: ignore[type-var]
        else:
            # File descriptors, so that the output of C++ code is redirected too.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                saved = os.dup(stream.fileno())
                os.dup2(log.fileno(), stream.fileno())
                stack.callback(_restore, stream, saved)
        yield


def _restore(stream: TextIO, saved: int) -> None:
    stream.flush()
    os.dup2(saved, stream.fileno())
    os.close(saved)


class _Tee:
    """A text stream that writes to the console and to a log, and otherwise is the console.

    A progress line that is overwritten (it contains a carriage return) is not logged. When the
    reader of the console has left, as `head` does, training continues with the log alone.
    """

    def __init__(self, console: TextIO, log: TextIO) -> None:
        self._console = console
        self._log = log

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._log.write(text)
        try:
            return self._console.write(text)
        except BrokenPipeError:
            self._discard_console()
            return len(text)

    def flush(self) -> None:
        try:
            self._console.flush()
        except BrokenPipeError:
            self._discard_console()

    def _discard_console(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._console.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)
