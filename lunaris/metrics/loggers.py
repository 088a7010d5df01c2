"""Where a run's metrics go: the console, `metrics.jsonl`, and any further logger."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from lunaris.config.schema.root import Config
from lunaris.console import Below, is_terminal, phase, say
from lunaris.metrics.expert_health import AlarmBell
from lunaris.metrics.progress import Progress
from lunaris.metrics.records import MetricsFile, Row
from lunaris.metrics.time_left import TimeLeft, in_words
from lunaris.runs.run_dir import RunDir

# The progress on a terminal is drawn again at most this often, in seconds.
_DRAW_S = 0.25


class Logger(Protocol):
    """Receives the rows of a run, in the process of rank 0. A subclass overrides what it needs."""

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Begin, or continue after step `step`. cfg: the composed config."""

    def tick(self, step: int) -> None:
        """Report that step `step` is done."""

    def log(self, row: Row) -> None:
        """Record one row: `step` and the metrics of that step by their names."""

    def message(self, text: str) -> None:
        """Show the user a text that is not a metric."""

    def flush(self) -> None:
        """Make the rows durable, because a checkpoint is about to be saved."""

    def finish(self) -> None:
        """Release what `start` opened; nothing is logged after this."""


class Loggers:
    """Calls several loggers in turn. With none it drops everything, as every other rank needs.

    An exception of a logger other than the local one is reported once and removes that logger; it
    never stops the run.
    """

    def __init__(self, loggers: dict[str, Logger]) -> None:
        """loggers: by their names in the `logger` group of the config."""
        self._loggers = dict(loggers)

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        self._each(lambda logger: logger.start(run_dir, cfg, step))

    def tick(self, step: int) -> None:
        self._each(lambda logger: logger.tick(step))

    def log(self, row: Row) -> None:
        self._each(lambda logger: logger.log(row))

    def message(self, text: str) -> None:
        self._each(lambda logger: logger.message(text))

    def flush(self) -> None:
        self._each(lambda logger: logger.flush())

    def finish(self) -> None:
        self._each(lambda logger: logger.finish())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:
                if isinstance(logger, LocalLogger):
                    raise
                del self._loggers[name]
                reason = f"{type(error).__name__}: {error}"
                say(f"logger.{name} failed and is dropped ({reason}); metrics.jsonl continues")


class LocalLogger:
    """`metrics.jsonl`, and the progress of the run: a line a row, or on a terminal one with a bar.

    On a terminal, only rows with a validation loss leave a line.
    """

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Open the metrics file after cutting rows past `step`, and show the progress."""
        trainer = cfg.trainer
        self._file = MetricsFile(run_dir.metrics_path, step)
        self._time = TimeLeft(trainer.end(), trainer.eval_interval, cfg.checkpoint.save_interval)
        self._bell = AlarmBell(getattr(cfg.moe, "balancing", None))
        self._extras: set[str] = set()
        self._began, self._drawn = time.monotonic(), 0.0
        self._progress = Progress(step, trainer.max_steps)
        self._below = Below(self._progress) if is_terminal(sys.stdout) else None
        if self._below is not None:
            self._below.start()
        self._first = ExitStack()
        if trainer.compile_model:
            self._first.enter_context(phase("compiling: the first step takes longer"))

    def tick(self, step: int) -> None:
        """Show that a step is done, and how long the others will take."""
        self._first.close()
        now = time.monotonic()
        self._time.step(now, self._extras)
        self._extras = set()
        self._progress.step = step
        seconds = self._time.seconds(step)
        self._progress.left = f"{in_words(seconds)} left" if seconds else ""
        if self._below is not None and now - self._drawn >= _DRAW_S:
            self._drawn = now
            self._below.refresh()

    def log(self, row: Row) -> None:
        """Write the row and show its losses, its speed and what is wrong with the experts."""
        self._file.append(row)
        self._progress.take(row)
        if "val/loss" in row:
            self._extras.add("evaluation")
            self._time.evaluated(time.monotonic() - self._began)
        if self._below is None:
            say(self._progress.line(row))
        elif "val/loss" in row:
            say(self._progress.short_line(row))
        for line in self._bell.take(row):
            say(line)

    def message(self, text: str) -> None:
        """Print lines."""
        say(text)

    def flush(self) -> None:
        """Make the rows durable; a checkpoint follows."""
        self._extras.add("checkpoint")
        self._file.sync()

    def finish(self) -> None:
        """Remove the progress and close the file."""
        self._first.close()
        if self._below is not None:
            self._below.stop()
        self._file.close()
