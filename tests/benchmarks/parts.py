"""CPU time of a step of the default command with each part, as a ratio of the default's.

    python tests/benchmarks/parts.py [OVERRIDE …] [--only TEXT] [--rounds N]

All take turns in one process, and the default comes right before each part, so that what else the
machine does meets both. Of each two steps the second is measured, with its weights in the
processor's cache. It prints the median of the ratios over the rounds and their quartiles. OVERRIDE
goes to every part, the default included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from statistics import median, quantiles
from typing import NamedTuple

import torch

from lunaris.config.compose import compose
from lunaris.distributed import session
from lunaris.distributed.signals import StopSignal
from lunaris.objective.base import Batch
from lunaris.run import build
from lunaris.runs.create import create
from lunaris.train import Run, train_step

# Each is the default command with these overrides.
PARTS = [
    "seed=1",  # Nothing else: how far a ratio is off.
    "optimizer=adamw",
    "model.norm=pre",
    "attention=sliding_window attention.window=64",
    "attention=mla model.norm=pre model.n_kv_heads=4",
    "attention=mla model.norm=pre model.n_kv_heads=4 attention.q_lora_rank=64",
    "attention.output_gate=true",
    "attention.sinks=true",
    "moe=none",
    "moe=switch",
    "moe/router=sigmoid",
    "moe/router=sigmoid moe.router.n_groups=4 moe.router.topk_groups=2",
    "moe.balance_scope=sequence",
    "moe.balancing=none",
    "moe=fine_grained moe/router=softmax",
    "moe=fine_grained",
    "model.activation=geglu",
    "model.activation=relu2",
    "objective.z_loss_weight=1e-4",
    "objective.logit_soft_cap=30",
    "objective=multi_token",
    "objective=multi_token objective.depth=2",
]


class Batched(NamedTuple):
    """A run and its next batches."""

    run: Run
    batches: Iterator[Batch]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--only", default="", help="the parts that contain this text")
    parser.add_argument("--rounds", type=int, default=7, help="ratios a part (default: 7)")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stop = stack.enter_context(StopSignal())
        stack.enter_context(session.join("cpu", 600.0))
        default = start(stack, args.overrides, f"{folder}/default", stop)
        runs = {
            part: start(stack, [*args.overrides, *part.split()], f"{folder}/{i}", stop)
            for i, part in enumerate(PARTS)
            if args.only in part
        }
        seconds: list[float] = []
        ratios: dict[str, list[float]] = {part: [] for part in runs}
        for round_ in range(args.rounds + 1):  # The first is a warm-up.
            for part, run in runs.items():
                reference = cpu_seconds(default)
                own = cpu_seconds(run)
                if round_:
                    seconds.append(reference)
                    ratios[part].append(own / reference)
    command = " ".join(["lunaris train", *args.overrides])
    print(f"threads {torch.get_num_threads()}, {command}: {median(seconds) * 1e3:.0f} ms a step")
    for part, found in ratios.items():
        low, middle, high = quantiles(found, n=4)
        print(f"{part:<72} {middle:5.2f}  ({low:.2f} to {high:.2f})")


def start(stack: ExitStack, overrides: list[str], folder: str, stop: StopSignal) -> Batched:
    """Return a run with these overrides in a new folder, and its batches."""
    own = ["trainer.device=cpu", "name=part", f"out_dir={folder}"]
    run_dir = create(compose([*overrides, *own]), "benchmark", [])
    with redirect_stdout(StringIO()):
        run = build(run_dir.read_config(), run_dir, stop)
    stack.callback(run.loader.close)
    stack.callback(run.logger.finish)
    return Batched(run, iter(run.loader))


def cpu_seconds(batched: Batched) -> float:
    """Return the CPU time of the second of two steps."""
    train_step(batched.run, next(batched.batches))
    batch = next(batched.batches)
    began = time.process_time()
    train_step(batched.run, batch)
    return time.process_time() - began


if __name__ == "__main__":
    main()
