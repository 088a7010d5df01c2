"""Replicated data parallelism on a device mesh against `parallelism=ddp`, in paired steps.

    python tests/benchmarks/ddp.py
    python tests/benchmarks/ddp.py moe=none model=tiny --processes 2 4 --pairs 20

Two candidates are compared with `ddp`: torch's `fully_shard` on a mesh whose shard dimension has
size 1 (HSDP with one process a replica), and torch's composable `replicate`. In one group of
processes the variants take one training step each in turn (two micro-steps, clipping, AdamW), so
that other work of the machine affects all of them; a ratio is the median over the pairs of steps.
Peak memory (the resident set above that of the process before the model was built) is measured in
a separate group for each variant. The backend is gloo, with one thread a process; the losses of
the variants must agree in every step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from processes import SMALL_CACHES, run_group
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lunaris.config.compose import compose
from lunaris.distributed import collectives, session
from lunaris.metrics.throughput import peak_memory_gb
from lunaris.objective.next_token import NextToken
from lunaris.optim.adamw import build_adamw
from lunaris.optim.clip import clip_grad_norm
from lunaris.parallelism.base import Parallelism
from lunaris.parallelism.ddp import DDP
from lunaris.parallelism.fsdp import HSDP
from lunaris.precision import Precision
from lunaris.run import bare_model

_VOCAB = 4096
_MODEL = ["parallelism=ddp", "model.max_seq_len=128", "data=synthetic", "data.vocab_size=4096"]


class Replicate(Parallelism):
    """Replicas through torch's composable `replicate`."""

    def wrap(
        self, model: nn.Module, *, precision: Precision, seed: int, compile: bool
    ) -> nn.Module:
        """Replicate each block and the rest, and draw the weights."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in model.blocks:  # type: ignore[union-attr]
            replicate(block, mesh=mesh, mp_policy=policy)
        replicate(model, mesh=mesh, mp_policy=policy)
        return super().wrap(model, precision=precision, seed=seed, compile=compile)

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients in the last micro-step only."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        with super().micro_step(model, last):
            yield


class Shard1(HSDP):
    """`fully_shard` on a mesh whose shard dimension has size 1."""

    def __init__(self) -> None:
        super().__init__(shard_size=1, reshard_after_forward=False)

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients in the last micro-step only."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        with Parallelism.micro_step(self, model, last):
            yield


VARIANTS: dict[str, Callable[[], Parallelism]] = {
    "ddp": DDP,
    "shard 1": Shard1,
    "replicate": Replicate,
}


def main() -> None:
    """Measure every number of processes and print one table."""
    args = _parser().parse_args()
    if args.worker:
        _worker(args)
        return
    print("variant    processes  step ms  ratio wall  ratio cpu  peak MiB  ratio peak")
    for processes in args.processes:
        times = _group("time", processes, args)
        peaks = {name: _group(name, processes, args)[name][0] for name in VARIANTS}
        for name in VARIANTS:
            ms, wall, cpu = times[name]
            print(
                f"{name:<9}  {processes:>9}  {ms:>7.1f}  {wall:>10.2f}  {cpu:>9.2f}"
                f"  {peaks[name]:>8.0f}  {peaks[name] / peaks['ddp']:>10.2f}",
                flush=True,
            )


def _group(work: str, processes: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Run one group of processes and return each variant's figures, which rank 0 prints."""
    command = [sys.executable, str(Path(__file__)), "--worker", work, *args.overrides]
    command += ["--pairs", str(args.pairs)]
    found: dict[str, list[float]] = run_group(
        command, processes, None if work == "time" else SMALL_CACHES
    )
    return found


def _worker(args: argparse.Namespace) -> None:
    with session.join("cpu", 600.0):
        if args.worker == "time":
            steps = {name: _steps(make(), args) for name, make in VARIANTS.items()}
            found = _times(steps, args.pairs)
        else:
            found = _peak(args)
        if session.rank() == 0:
            print(json.dumps(found))


def _steps(parallelism: Parallelism, args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that takes one step and returns its loss."""
    cfg = compose([*_MODEL, *args.overrides])
    model = parallelism.wrap(
        bare_model(cfg, _VOCAB), precision=Precision("fp32", parallelism.device), seed=0,
        compile=False,
    )  # fmt: skip
    optimizer = build_adamw(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
    )
    generator = torch.Generator().manual_seed(session.rank())

    def step() -> float:
        for last in (False, True):
            tokens = torch.randint(_VOCAB, (2, 129), generator=generator)
            with parallelism.micro_step(model, last=last):
                batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
                loss = NextToken()(model, batch).total / 2
                loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _times(steps: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Return each variant's median milliseconds, and ratios to `ddp` of wall and of CPU time."""
    rows = []
    names = list(steps)
    for pair in range(-2, pairs):
        row = {}
        first = pair % len(names)
        for name in names[first:] + names[:first]:
            collectives.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = steps[name]()
            row[name] = time.perf_counter() - wall, time.process_time() - cpu, loss
        losses = [loss for *_, loss in row.values()]
        assert max(losses) - min(losses) < 1e-5, losses
        if pair >= 0:  # Two steps to warm up.
            rows.append(row)
    found = {}
    for name in names:
        ratios = [[row[name][i] / row["ddp"][i] for row in rows] for i in (0, 1)]
        ms = [1e3 * row[name][0] for row in rows]
        found[name] = [statistics.median(column) for column in (ms, *ratios)]
    return found


def _peak(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return one variant's peak memory in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    step = _steps(VARIANTS[args.worker](), args)
    for _ in range(3):
        step()
    return {args.worker: [peak_memory_gb(torch.device("cpu")) * 1024 - before]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
