"""Speed of a training step as the number of experts grows, at equal active size.

    python tests/benchmarks/experts.py [--experts 8 64 …] [--tokens 2048 16384] [--rounds N]

For each number of experts and of tokens a step (in micro-steps of 2,048), four processes take
turns: the step with 8 experts, that with more, its floor (the bare products and one step of the
optimizer) and Hugging Face's; see `against.py`. Prints the medians of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

from against import SHAPE, Arm, Ratio, compare, measure

_MICRO_STEP = 2048


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        for n_experts in args.experts:
            rows.append(row(n_experts, tokens, args.rounds))
            if not args.json:
                print(as_text(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))


def row(n_experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of one number of experts at so many tokens a step."""
    steps = tokens // _MICRO_STEP

    def overrides(experts: int) -> list[str]:
        keys = ["moe=switch", f"moe.n_experts={experts}"]
        return [*SHAPE, *keys, f"trainer.gradient_accumulation_steps={steps}"]

    arms = [Arm("8", "ours", overrides(8))]
    arms += [Arm(kind, kind, overrides(n_experts)) for kind in ("ours", "floor", "hf")]
    speeds = measure(arms, 2 if steps == 1 else 1, rounds)
    return {
        "experts": n_experts,
        "tokens": tokens,
        "tokens_per_cpu_s": median(speeds["ours"]),
        "of_8_experts": compare(speeds["ours"], speeds["8"])._asdict(),
        "time_over_floor": compare(speeds["floor"], speeds["ours"])._asdict(),
        "of_hugging_face": compare(speeds["ours"], speeds["hf"])._asdict(),
    }


def as_text(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    ratios = [
        f"{text} {Ratio(**row[name])}"
        for name, text in (
            ("of_8_experts", "speed of 8 experts"),
            ("time_over_floor", "time over the floor"),
            ("of_hugging_face", "speed of Hugging Face"),
        )
    ]
    return f"{row['experts']:>4} experts, {row['tokens']:>6,} tokens   " + "   ".join(ratios)


if __name__ == "__main__":
    main()
