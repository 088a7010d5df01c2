"""A run that is built in a temporary folder, for the benchmarks of a step; and CPU time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lunaris.config.compose import compose
from lunaris.distributed import session
from lunaris.distributed.signals import StopSignal
from lunaris.run import build
from lunaris.runs.create import create
from lunaris.train import Run


@contextmanager
def built_run(overrides: Sequence[str]) -> Iterator[Run]:
    """Build the run of a command line; it ends with the context, and so does its folder."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose([*overrides, "name=benchmark", f"out_dir={folder}/run"])
        run_dir = create(cfg, "benchmark", [])
        with session.join(cfg.trainer.device, 600.0), StopSignal() as stop:
            run = build(run_dir.read_config(), run_dir, stop)
            try:
                yield run
            finally:
                run.loader.close()
                run.logger.finish()


def cpu_seconds(action: Callable[[], object], times: int = 1) -> float:
    """Return the process's CPU time of an action, the mean of `times`."""
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times
