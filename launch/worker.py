"""One process of a run: `python -m lunaris.launch.worker RUN_DIR`.

The entry of the local launcher's workers, of SLURM tasks, of sweep points and of resumed runs. It
reads the frozen config of the folder; nothing is composed again.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from lunaris.distributed.signals import StopSignal
from lunaris.errors import Stopped, UserError
from lunaris.runs.run_dir import RunDir


def main(argv: list[str] | None = None) -> int:
    """Train the run in a folder and return the exit code of the command line's contract."""
    args = sys.argv[1:] if argv is None else argv
    if len(args) != 1:
        print("usage: python -m lunaris.launch.worker RUN_DIR", file=sys.stderr)
        return UserError.exit_code
    try:
        # From here on: a signal that comes while torch is imported must not end the process.
        with StopSignal():
            cfg = RunDir(args[0]).read_config()
            if "RANK" not in os.environ and cfg.launch.get("processes", 1) > 1:
                from lunaris.launch.local import Local

                return Local.of(cfg).start(Path(args[0]))
            return _work_to_code(cfg, Path(args[0]))
    except UserError as error:
        _say(f"error: {error}")
        return UserError.exit_code
    except Stopped as stopped:
        _say(f"stopped: {stopped}")
        return Stopped.exit_code


def _work_to_code(cfg: Any, path: Path) -> int:
    try:
        work(cfg, path)
    except (UserError, Stopped):
        raise
    except Exception:  # Printed, with its traceback, and in the rank's log.
        return 1
    return 0


def work(cfg: Any, path: Path) -> Any:
    """Train as this process of the run in folder `path`; return the `RunResult`.

    What the process prints, and the traceback of what ends it, is in `logs/rank_K.log`; rank 0
    prints to the console as well. Raises what `lunaris.run.execute` raises.
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


def _record(error: BaseException) -> None:
    from lunaris.distributed.heartbeat import record_failure

    expected = isinstance(error, UserError | Stopped)
    record_failure(str(error) if expected else f"{type(error).__name__}: {error}")


def _say(message: str) -> None:
    # Under torch's elastic agent the launcher says it, once for all processes.
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(message, file=sys.stderr)


@contextmanager
def _logged(log: TextIO, also_console: bool) -> Iterator[None]:
    """Send what is printed to the log; of rank 0 to the console as well."""
    with ExitStack() as stack:
        if also_console:
            stack.enter_context(redirect_stdout(_Tee(sys.stdout, log)))  # type: ignore[type-var]
            stack.enter_context(redirect_stderr(_Tee(sys.stderr, log)))  # type: ignore[type-var]
        else:
            # File descriptors, so that what C++ prints lands there too.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                kept = os.dup(stream.fileno())
                os.dup2(log.fileno(), stream.fileno())
                stack.callback(_restore, stream, kept)
        yield


def _restore(stream: TextIO, kept: int) -> None:
    stream.flush()
    os.dup2(kept, stream.fileno())
    os.close(kept)


class _Tee:
    """A text stream that writes to the console and to a log; otherwise it is the console.

    A progress line that is written over and over (it ends in no newline) is not logged. A console
    whose reader has left, as `head` does, stops nothing: training goes on with its log.
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
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._console.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._console.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)


if __name__ == "__main__":
    sys.exit(main())
