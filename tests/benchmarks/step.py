"""Tokens a second of the default training step, and where its time goes.

    python tests/benchmarks/step.py [OVERRIDE …] [--steps N] [--rounds N]

The reference of the same run is the bare matrix products of the step: forward and backward of
every product, of the same shapes and with the same number of threads, and nothing else. The ratio
is how much of the step's time they would take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from built import built_run
from torch.profiler import ProfilerActivity, profile

from lunaris.parallelism.base import unwrap
from lunaris.train import train_step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--steps", type=int, default=10, help="steps a round (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="the best counts (default: 5)")
    args = parser.parse_args()
    with built_run(args.overrides) as run:
        measure(run, args.steps, args.rounds)


def measure(run: Any, steps: int, rounds: int) -> None:
    """Print the step's speed, its share of bare products, its wait for data, and a profile."""
    batches = iter(run.loader)
    waited: list[float] = []

    def training() -> None:
        for _ in range(steps):
            train_step(run, next(batches))
            waited.append(run.loader.wait_s)

    products = bare_products(run)
    training()
    waited.clear()
    # Turn by turn, so that what else the machine does meets both.
    times = [(seconds(training) / steps, seconds(products)) for _ in range(rounds)]
    step_s, product_s = (min(column) for column in zip(*times, strict=True))
    tokens = run.global_batch * run.cfg.model.max_seq_len
    print(f"threads              {torch.get_num_threads()}")
    print(f"step                 {step_s * 1e3:.1f} ms = {tokens / step_s:,.0f} tokens/s")
    print(f"bare products        {product_s * 1e3:.1f} ms")
    print(f"ratio products/step  {product_s / step_s:.2f}")
    print(f"data wait/step       {sum(waited) / len(waited) / step_s:.4f}")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train_step(run, next(batches))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


def bare_products(run: Any) -> Callable[[], None]:
    """Return a function that does the products of one process's part of a step."""
    model, trainer = unwrap(run.model), run.cfg.trainer
    tokens = trainer.batch_size * run.cfg.model.max_seq_len
    k = getattr(run.cfg.moe, "n_experts_per_token", 1)
    shapes = []
    for parameter in model.parameters():
        if parameter.ndim == 3:
            # Stacked experts: each takes an equal part of the assignments.
            experts, width, out = parameter.shape
            shapes += [(tokens * k // experts, width, out)] * experts
        elif parameter.ndim == 2:
            shapes.append((tokens, parameter.shape[1], parameter.shape[0]))
    operands = [
        (torch.randn(rows, width), torch.randn(width, out), torch.randn(rows, out))
        for rows, width, out in shapes
    ]

    def products() -> None:
        for _ in range(trainer.gradient_accumulation_steps):
            for x, w, grad in operands:
                torch.mm(x, w)
                torch.mm(grad, w.T)
                torch.mm(x.T, grad)

    return products


def seconds(action: Callable[[], None]) -> float:
    """Return how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
