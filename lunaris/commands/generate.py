"""`lunaris generate`: sample text from a run's checkpoint, with a KV cache."""

from __future__ import annotations

import argparse
import math
import sys

from lunaris.config.trust import add_flag, allow
from lunaris.errors import UserError
from lunaris.runs.run_dir import RunDir


def main(argv: list[str]) -> int:
    """Print the prompt and its continuations as they are sampled; return the exit code."""
    args = _parser().parse_args(argv)
    allow(args.trust)
    _check(args)
    run_dir = RunDir(args.dir)
    cfg = run_dir.read_config()

    # Imports torch and tokenizers, which `--help` does not need.
    from lunaris.inference import sample_texts

    seeds = range(args.seed, args.seed + args.samples)
    texts = sample_texts(
        cfg,
        run_dir,
        args.prompt,
        seeds=seeds,
        step=args.step,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        speculative=args.speculative,
    )
    # Faults of the run were raised before the first text.
    for i, (seed, pieces) in enumerate(zip(seeds, texts, strict=True)):
        if args.samples > 1:
            print(f"--- sample {i + 1} (seed {seed})")
        sys.stdout.write(args.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris generate",
        description="Sample text from a run's checkpoint.",
        epilog="example: lunaris generate runs/default --prompt 'def main(' --temperature 0.8",
    )
    parser.add_argument("dir", help="the run's folder")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="the length (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample within this probability mass")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the seed of the first sample; each next one adds 1 (default: 0)",
    )
    parser.add_argument("--samples", type=int, default=1, help="how many texts (default: 1)")
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="draft with the depths of objective=multi_token: the same text, in fewer forwards",
    )
    parser.add_argument(
        "--at",
        "--step",
        dest="step",
        type=int,
        metavar="STEP",
        help="the checkpoint (default: the newest)",
    )
    add_flag(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, value, fits, allowed in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--samples", args.samples, args.samples >= 1, "at least 1"),
        (
            "--temperature",
            args.temperature,
            args.temperature == 0 or 1e-3 <= args.temperature < math.inf,
            "0 (greedy) or at least 0.001",
        ),
        ("--seed", args.seed, 0 <= args.seed < 2**63 - args.samples, "at least 0, below 2**63"),
        ("--top-k", args.top_k, args.top_k is None or args.top_k >= 1, "at least 1"),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "in (0, 1]"),
    ):
        if not fits:
            raise UserError(f"{name} {value}: must be {allowed}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt: must be text in UTF-8") from error
