"""CPU time of the check for values that are not finite, as a share of the default step's.

    python tests/benchmarks/guard.py [OVERRIDE …] [--rounds N]

What the check adds to a step: the judgement on the device, what the host reads of the step before,
the copies of the balance buffers, and the optimizer's look at `found_inf`. The last is the
difference between two optimizer steps on the same gradients, with it and without, turn by turn.
"""

from __future__ import annotations

import argparse
from statistics import median, quantiles

import torch
from built import built_run, cpu_seconds

from lunaris.optim.guard import StepRange, restore_where, take_step
from lunaris.parallelism.base import unwrap
from lunaris.train import Run, train_step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--rounds", type=int, default=15, help="steps to measure (default: 15)")
    args = parser.parse_args()
    with built_run(args.overrides) as run:
        measure(run, args.rounds)


def measure(run: Run, rounds: int) -> None:
    """Print the time of a step, and what share of it each part of the check takes."""
    batches = iter(run.loader)
    steps: list[float] = []
    shares: dict[str, list[float]] = {"judge and settle": [], "balance": [], "found_inf": []}
    for i in range(rounds + 1):  # The first is a warm-up.
        step = cpu_seconds(lambda: train_step(run, next(batches)))
        run.state.step += 1
        found = {
            "judge and settle": cpu_seconds(lambda: judge(run), 20),
            "balance": cpu_seconds(lambda: copy_balance(run), 20),
            "found_inf": found_inf_seconds(run),
        }
        if i:
            steps.append(step)
            for name, seconds in found.items():
                shares[name].append(seconds / step)
    print(f"threads {torch.get_num_threads()}, a step {median(steps) * 1e3:.1f} ms of CPU time")
    shares["all"] = [sum(row) for row in zip(*shares.values(), strict=True)]
    for name, found_shares in shares.items():
        low, middle, high = quantiles(found_shares, n=4)
        print(f"{name:<18} {middle:8.3%} of a step  ({low:.3%} to {high:.3%})")


def judge(run: Run) -> None:
    """Judge a step and read the judgement of the one before."""
    at = StepRange(run.state.step, 0, 0)
    value = torch.ones((), dtype=torch.float64, device=run.parallelism.device)
    run.guard.judge(at, value, value)
    for _ in run.guard.settle(lag=1):
        pass


def copy_balance(run: Run) -> None:
    """Copy the balance buffers and write them back."""
    buffers = unwrap(run.model).balance_buffers()
    skip = torch.zeros((), device=run.parallelism.device)
    restore_where(skip, buffers, [buffer.clone() for buffer in buffers])


def found_inf_seconds(run: Run) -> float:
    """Return the time of an optimizer step with `found_inf` less that without."""
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    skip = torch.zeros((), device=run.parallelism.device)
    with_it = [cpu_seconds(lambda: take_step(run.optimizer, skip)) for _ in range(5)]
    without = [cpu_seconds(run.optimizer.step) for _ in range(5)]
    run.optimizer.zero_grad()
    return min(with_it) - min(without)


if __name__ == "__main__":
    main()
