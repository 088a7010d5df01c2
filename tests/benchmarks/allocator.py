"""CPU time of a step with the allocator's settings for CPU runs, over that without.

    python tests/benchmarks/allocator.py [OVERRIDE …] [--steps N] [--rounds N]

Pairs of new processes, one with glibc's defaults and one with `keep_freed_memory`, take turns. Each
takes N steps after a warm-up. Prints the ratio of CPU times (user and system), page faults a step
and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median


def main() -> None:
    """Start the processes, or be one of them; print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--steps", type=int, default=6, help="steps a process (default: 6)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes (default: 5)")
    parser.add_argument("--one", choices=["default", "kept"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.overrides, args.steps, kept=args.one == "kept")))
        return
    rows: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(args.rounds):
        rows.append((start(args, "default"), start(args, "kept")))
    for name in ("cpu_ms", "faults", "peak_mb"):
        before, after = (median(row[i][name] for row in rows) for i in (0, 1))
        ratio = median(b[name] / a[name] for a, b in rows)
        print(f"{name:<8} {before:10.0f} → {after:10.0f}   ratio {ratio:.3f}")


def start(args: argparse.Namespace, which: str) -> dict[str, float]:
    """Return what a new process measured."""
    command = [sys.executable, __file__, *args.overrides, "--one", which, f"--steps={args.steps}"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def measure(overrides: list[str], steps: int, *, kept: bool) -> dict[str, float]:
    """Return CPU time (ms) and page faults a step, and the peak of resident memory (MB)."""
    from lunaris.launch.allocator import keep_freed_memory

    if kept:
        keep_freed_memory("cpu")
    from lunaris.config.compose import compose
    from lunaris.distributed import session
    from lunaris.distributed.signals import StopSignal
    from lunaris.run import build
    from lunaris.runs.create import create
    from lunaris.train import train_step

    with tempfile.TemporaryDirectory() as folder:
        own = ["trainer.device=cpu", "name=benchmark", f"out_dir={folder}/run"]
        run_dir = create(compose([*overrides, *own]), "benchmark", [])
        with session.join("cpu", 600.0), StopSignal() as stop:
            run = build(run_dir.read_config(), run_dir, stop)
            batches = iter(run.loader)
            try:
                for i in range(steps + 2):
                    if i == 2:
                        began, faults = time.process_time(), page_faults()
                    train_step(run, next(batches))
                spent, faulted = time.process_time() - began, page_faults() - faults
            finally:
                run.loader.close()
                run.logger.finish()
    return {
        "cpu_ms": spent / steps * 1e3,
        "faults": max(faulted / steps, 1.0),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def page_faults() -> int:
    """Return how many page faults this process has had."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


if __name__ == "__main__":
    main()
