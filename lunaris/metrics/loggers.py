"""Where a run's metrics go: the console, `metrics.jsonl`, and any further logger."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from tqdm import tqdm

from lunaris.config.schema.root import Config
from lunaris.metrics.records import MetricsFile, Row
from lunaris.runs.run_dir import RunDir


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
    """A progress bar on a terminal, plain lines in a log file, and `metrics.jsonl`."""

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Open the metrics file after cutting rows past `step`, and show the bar."""
        self._file = MetricsFile(run_dir.metrics_path, step)
        self._max_steps = cfg.trainer.max_steps
        self._first = (step, time.monotonic())
        self._shown: dict[str, str] = {}
        self._bar = tqdm(
            total=self._max_steps,
            initial=step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def tick(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def log(self, row: Row) -> None:
        """Write the row and show its losses and its speed."""
        self._file.append(row)
        for key, name, form in (
            ("train/loss", "loss", "{:.4f}"),
            ("val/loss", "val", "{:.4f}"),
            ("perf/tokens_per_s", "tokens/s", "{:,.0f}"),
        ):
            if row.get(key) is not None:
                self._shown[name] = form.format(row[key])
        if not self._bar.disable:
            self._bar.set_postfix(self._shown, refresh=False)
            return
        shown = "  ".join(f"{name} {value}" for name, value in self._shown.items())
        say(f"step {row['step']}/{self._max_steps}  {shown}  ETA {self._eta(row['step'])}")

    def message(self, text: str) -> None:
        say(text)

    def flush(self) -> None:
        self._file.sync()

    def finish(self) -> None:
        self._bar.close()
        self._file.close()

    def _eta(self, step: int) -> str:
        first_step, started = self._first
        done = max(1, step - first_step)
        left = (time.monotonic() - started) / done * (self._max_steps - step)
        return tqdm.format_interval(left)


def say(text: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(text)
    sys.stdout.flush()
