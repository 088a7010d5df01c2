"""What single steps of a run show: `python -m lunaris.check.steps DIR`.

DIR is a folder with the frozen config, into which the items are written.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from lunaris.check.exposed import exposed_communication
from lunaris.check.group import Looks, look_in_processes
from lunaris.check.micro_batch import largest_micro_batch
from lunaris.check.waits import host_waits
from lunaris.config.schema.root import Config
from lunaris.distributed.signals import StopSignal
from lunaris.objective.base import Batch
from lunaris.run import build
from lunaris.runs.run_dir import RunDir
from lunaris.train import Run, report_skips, sequences_of_step, train_step

MODULE = "lunaris.check.steps"
# Steps that come first: they allocate memory, and kernels are chosen in them.
_WARM = 2


class Steps:
    """Takes steps of a run as `lunaris.train.train` does, without logging and saving."""

    def __init__(self, run: Run) -> None:
        self.run, self._batches = run, iter(run.loader)

    def next_batch(self) -> Batch:
        """Return the micro-steps of a process's part of the next global batch."""
        return next(self._batches)

    def take(self) -> None:
        """Take the next step."""
        run = self.run
        stats = train_step(run, self.next_batch())
        run.state.step += 1
        run.state.sequences = sequences_of_step(run)[1] + 1
        report_skips(run, lag=1)
        run.parallelism.agree(False, stats.votes)

    def fits(self, sequences: int) -> bool:
        """Take a step of one micro-step with so many sequences; return whether memory is enough."""
        batch = {name: part[0] for name, part in self.next_batch().items()}
        repeated = torch.arange(sequences) % len(batch["tokens"])
        larger = {name: part[repeated.to(part.device)][None] for name, part in batch.items()}
        try:
            train_step(self.run, larger)
        except torch.OutOfMemoryError:
            fitted = False
        else:
            fitted = True
        # The error has gone, and with it the graph that held the memory.
        self.run.optimizer.zero_grad()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return fitted


def looks(cfg: Config, path: Path, stack: ExitStack) -> Looks:
    """Build the run and take its first steps; return what every process looks at then."""
    run = build(cfg, RunDir(path), StopSignal())
    stack.callback(run.loader.close)
    stack.callback(run.logger.finish)
    steps = Steps(run)
    for _ in range(_WARM):
        steps.take()
    return {
        "waits": partial(host_waits, run.cfg, steps.take),
        "exposed": partial(exposed_communication, run, steps.next_batch),
        # The last one: where it fails, memory may be full.
        "micro-batch": partial(largest_micro_batch, run.cfg, steps.fits),
    }


if __name__ == "__main__":
    sys.exit(look_in_processes(Path(sys.argv[1]), MODULE, looks))
