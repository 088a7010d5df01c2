"""Trains runs in groups of processes, one group after the other: `matrix.py PLAN`.

PLAN is a JSON list of groups: `processes`, `port`, and `folders`, each with a run's config.yaml.
The runs of a group are trained one after the other, each through the real build and loop. Rank 0
leaves `hashes.json` (one hash a global batch) and `weights.json` (one hash a rank, of its weights
and optimizer state) next to the run's own files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lunaris.data.loader import Loader
from lunaris.distributed import collectives, session
from lunaris.distributed.signals import StopSignal
from lunaris.objective.base import Batch
from lunaris.precision import Precision
from lunaris.run import build
from lunaris.runs.run_dir import RunDir
from lunaris.train import Run, train


class Recorded:
    """A loader that keeps a hash of every global batch it gives, in the global order."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.hashes: list[str] = []

    @property
    def wait_s(self) -> float:
        return self._loader.wait_s

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            # [W][A, B, L] → [A, W, B, L]: micro-step m of rank r has sequences (m · W + r) · B on.
            parts = collectives.gather_objects(torch.stack([batch["tokens"], batch["targets"]]))
            whole = torch.stack(parts, dim=2).contiguous()
            self.hashes.append(hashlib.sha256(whole.numpy().tobytes()).hexdigest())
            yield batch


def weights_hash(run: Run) -> str:
    """Return a hash of this process's weights and optimizer state, bit for bit."""
    found = hashlib.sha256()
    state = [value for s in run.optimizer.state.values() for value in s.values()]
    for value in [*run.model.parameters(), *run.model.buffers(), *state]:
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        found.update(local.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def train_one(folder: Path) -> None:
    """Train the run in a folder and write down its hashes."""
    run_dir = RunDir(folder)
    with StopSignal() as stop:
        run = build(run_dir.read_config(), run_dir, stop)
        loader, run.loader = run.loader, Recorded(run.loader)  # type: ignore[assignment]
        save = run.checkpoints.save

        def save_unless_done(*args: Any, **keys: Any) -> None:
            # No test reads the checkpoint of the last step, and there are many runs.
            if run.state.step < run.cfg.trainer.max_steps:
                save(*args, **keys)

        run.checkpoints.save = save_unless_done  # type: ignore[method-assign]
        try:
            train(run)
        finally:
            loader.close()
            run.logger.finish()
    weights = collectives.gather_objects(weights_hash(run))
    if session.rank() == 0:
        (folder / "hashes.json").write_text(json.dumps(run.loader.hashes))  # type: ignore[attr-defined]
        (folder / "weights.json").write_text(json.dumps(weights))


def check_overflow_is_agreed() -> None:
    """Assert that no process steps when another one's gradient overflowed."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = Precision("fp16", torch.device("cpu")).scaler
    scaler.scale(parameter.sum()).backward()
    if session.rank() == session.world_size() - 1:
        parameter.grad[0] = float("inf")  # type: ignore[index]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert scaler.get_scale() == 2.0**14


def work(rank: int, processes: int, port: int, folders: list[str]) -> None:
    """Be one process of a group and train its runs."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    with session.join("cpu", 120.0):
        check_overflow_is_agreed()
        for folder in folders:
            train_one(Path(folder))


def main() -> None:
    """Train the groups of the plan; exit with 1 after the first that fails."""
    # Forks of this process, which has imported torch: importing it takes a process as long as a
    # few runs.
    forks = multiprocessing.get_context("fork")
    for group in json.loads(Path(sys.argv[1]).read_text()):
        processes = group["processes"]
        started = [
            forks.Process(target=work, args=(rank, processes, group["port"], group["folders"]))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            sys.exit(1)


if __name__ == "__main__":
    main()
