"""Where a run's metrics go: the console and `metrics.jsonl`."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from lunaris.metrics.records import MetricsFile
from lunaris.runs.run_dir import RunDir


class Logger:
    """Receives the rows of a run, on the process of rank 0.

    This one drops them, which is what every other rank wants.
    """

    def start(self, run_dir: RunDir, cfg: Any, step: int) -> None:
        """Begin, or go on after step `step`. cfg: the composed config."""

    def tick(self, step: int) -> None:
        """Say that step `step` is done."""

    def log(self, row: dict[str, Any]) -> None:
        """Record one row; it holds `step` and the metrics named in the design."""

    def message(self, text: str) -> None:
        """Tell the person something that is not a metric."""

    def flush(self) -> None:
        """Make what was logged durable."""

    def finish(self) -> None:
        """End; nothing is logged after."""


class LocalLogger(Logger):
    """A progress bar on a terminal, plain lines in a log file, and `metrics.jsonl`."""

    def start(self, run_dir: RunDir, cfg: Any, step: int) -> None:
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
        """Move the bar."""
        self._bar.update(step - self._bar.n)

    def log(self, row: dict[str, Any]) -> None:
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
        print(
            f"step {row['step']}/{self._max_steps}  {shown}  ETA {self._eta(row['step'])}",
            flush=True,
        )

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def flush(self) -> None:
        """Make the metrics file durable."""
        self._file.sync()

    def finish(self) -> None:
        """Close the bar and the file."""
        self._bar.close()
        self._file.close()

    def _eta(self, step: int) -> str:
        first_step, started = self._first
        done = max(1, step - first_step)
        left = (time.monotonic() - started) / done * (self._max_steps - step)
        return tqdm.format_interval(left)
