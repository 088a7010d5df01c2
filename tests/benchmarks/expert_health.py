"""CPU time of the numbers on the health of experts, as a share of the default step's.

    python tests/benchmarks/expert_health.py [OVERRIDE …] [--rounds N]

Each step: the mean of the largest gates of every layer. Each row: the numbers of all layers, the
router's own, and the alarms; shown as a share of the steps of one row. Each evaluation: the choices
that are copied and compared.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from built import built_run, cpu_seconds

from lunaris.metrics.churn import RoutingChurn
from lunaris.metrics.expert_health import AlarmBell
from lunaris.moe.layer import MoE
from lunaris.parallelism.base import unwrap
from lunaris.train import Run, StepStats, moe_row, train_step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--rounds", type=int, default=9, help="steps to measure (default: 9)")
    args = parser.parse_args()
    with built_run(args.overrides) as run:
        measure(run, args.rounds)


def measure(run: Run, rounds: int) -> None:
    """Print the time of a step, and what share of it each part takes."""
    layers = [module for module in unwrap(run.model).modules() if isinstance(module, MoE)]
    cfg, batches = run.cfg, iter(run.loader)
    tokens = cfg.trainer.batch_size * cfg.model.max_seq_len
    gates = torch.rand(tokens, layers[0].k)
    experts = [torch.randint(layer.n_experts, (1, tokens, layer.k)) for layer in layers]
    bell, churn = AlarmBell("aux_loss"), RoutingChurn()
    steps, taken = [], {"each step": [], "each row": [], "each evaluation": []}

    def confidence() -> None:
        for _ in range(len(layers) * cfg.trainer.gradient_accumulation_steps):
            gates.amax(dim=-1).mean()

    def row(stats: StepStats) -> None:
        bell.take({"step": 1} | moe_row(unwrap(run.model), stats))

    def evaluation() -> None:
        churn.watch(experts)
        churn.row(range(len(layers)))

    for i in range(rounds + 1):  # The first is a warm-up.
        found: list[StepStats] = []
        step = cpu_seconds(lambda: found.append(train_step(run, next(batches))))  # noqa: B023
        run.state.step += 1
        per_row = cfg.trainer.log_interval * step
        shares = (
            cpu_seconds(confidence, 20) / step,
            cpu_seconds(lambda: row(found[0]), 20) / per_row,  # noqa: B023
            cpu_seconds(evaluation, 20) / step,
        )
        if i:
            steps.append(step)
            for name, share in zip(taken, shares, strict=True):
                taken[name].append(share)
    print(f"threads {torch.get_num_threads()}, a step {median(steps) * 1e3:.1f} ms of CPU time")
    of = {"each row": f"{cfg.trainer.log_interval} steps"}
    for name, values in taken.items():
        print(f"{name:<16} {median(values):8.3%} of {of.get(name, 'a step')}")


if __name__ == "__main__":
    main()
