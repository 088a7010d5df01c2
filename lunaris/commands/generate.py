"""`lunaris generate`: sample text from a run's checkpoint, with a KV cache."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lunaris.config.trust import add_flag, allow
from lunaris.errors import UserError
from lunaris.runs.data_fingerprint import intact_tokenizer
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    from lunaris.sampling import Piece, Request


def main(argv: list[str]) -> int:
    """Print the prompts and their continuations; return the exit code."""
    args = _parser().parse_args(argv)
    allow(args.trust)
    _check(args)
    prompts = [*args.prompt, *(_read_prompts(args.prompts) if args.prompts else [])]
    _check_prompts(prompts)
    run_dir = RunDir(args.dir)
    cfg = run_dir.read_config()
    intact_tokenizer(run_dir)

    # Imports torch and tokenizers, which `--help` does not need.
    from lunaris.sampling import Request, Settings, sample_texts

    requests = [
        Request(prompt, args.seed + sample) for prompt in prompts for sample in range(args.samples)
    ]
    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=tuple(args.stop),
        speculative=args.speculative,
        batch_size=args.batch_size,
    )
    pieces = sample_texts(cfg, run_dir, requests, settings, step=args.step)
    show = _as_json(requests) if args.json else _Printer(requests, args.samples).show
    # Faults of the run are raised before the first piece.
    for piece in pieces:
        show(piece)
    return 0


class _Printer:
    """Prints the texts in order, the one whose turn it is piece by piece."""

    def __init__(self, requests: list[Request], samples: int) -> None:
        self._requests, self._samples = requests, samples
        self._waiting = ["" for _ in requests]
        self._ended = [False for _ in requests]
        self._turn, self._begun = 0, False

    def show(self, piece: Piece) -> None:
        """Print what a piece settles."""
        self._waiting[piece.index] += piece.text
        self._ended[piece.index] |= piece.ended is not None
        if not self._begun:
            self._begun = True
            self._begin()
        while self._turn < len(self._requests):
            sys.stdout.write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._ended[self._turn]:
                break
            print()
            self._turn += 1
            if self._turn < len(self._requests):
                self._begin()
        sys.stdout.flush()

    def _begin(self) -> None:
        """Print the heading of the next text, where there are several, and its prompt."""
        request, sample = self._requests[self._turn], self._turn % self._samples + 1
        number = self._turn // self._samples + 1
        several = len(self._requests) > self._samples
        title = [f"prompt {number}"] * several + [f"sample {sample}"] * (self._samples > 1)
        if title:
            print(f"--- {', '.join(title)} (seed {request.seed})")
        sys.stdout.write(request.prompt)


def _as_json(requests: list[Request]) -> Callable[[Piece], None]:
    """Return what prints each text as one JSON object a line, when it has ended."""
    texts = ["" for _ in requests]

    def show(piece: Piece) -> None:
        texts[piece.index] += piece.text
        if piece.ended:
            request = requests[piece.index]
            row = {
                "prompt": request.prompt, "text": texts[piece.index], "seed": request.seed,
                "tokens": piece.tokens, "ended": piece.ended,
            }  # fmt: skip
            print(json.dumps(row, ensure_ascii=False), flush=True)

    return show


def _read_prompts(name: str) -> list[str]:
    """Return the prompts of a file, one a line, or in a `.jsonl` file one JSON object a line."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode()
    except OSError as error:
        raise UserError(f"--prompts {name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {name}: must be text in UTF-8") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {name}: holds no prompt")
    if not name.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:  # Python limits digits and nesting.
            raise UserError(f"--prompts {name}, line {number}: not JSON ({error})") from error
        prompt = found.get("prompt") if isinstance(found, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f'--prompts {name}, line {number}: must be {{"prompt": TEXT}}')
        prompts.append(prompt)
    return prompts


def _check_prompts(prompts: list[str]) -> None:
    if not prompts:
        raise UserError("generate: needs --prompt TEXT, or --prompts FILE (- for standard input)")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("--prompt: must be text in UTF-8") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris generate",
        description="Sample text from a run's checkpoint.",
        epilog="example: lunaris generate runs/default --prompt 'def main(' --temperature 0.8",
    )
    parser.add_argument("dir", help="the run's folder")
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the text to continue; may be repeated",
    )
    add(
        "--prompts",
        metavar="FILE",
        help='prompts from a file, one a line, or {"prompt": TEXT} in a .jsonl; - reads them from '
        "standard input",
    )
    add("--max-new-tokens", type=int, default=128, help="the length (default: 128)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-k", type=int, help="sample from the k most likely tokens")
    add("--top-p", type=float, help="sample within this probability mass")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text before this string; may be repeated",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="the seed of a prompt's first sample; each next one adds 1 (default: 0)",
    )
    add("--samples", type=int, default=1, help="how many texts a prompt (default: 1)")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="so many texts are sampled together (default: 16)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object a line: prompt, text, seed, "
        "tokens, ended (eot, stop or length)",
    )
    add(
        "--speculative",
        action="store_true",
        help="draft with the depths of objective=multi_token: the same text, in fewer forwards",
    )
    add(
        "--at",
        "--step",
        dest="step",
        type=int,
        metavar="STEP",
        help="the checkpoint (default: the newest)",
    )
    add_flag(parser)
    return parser  # fmt: skip


def _check(args: argparse.Namespace) -> None:
    for name, value, fits, allowed in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--samples", args.samples, args.samples >= 1, "at least 1"),
        ("--batch-size", args.batch_size, args.batch_size >= 1, "at least 1"),
        (
            "--temperature",
            args.temperature,
            args.temperature == 0 or 1e-3 <= args.temperature < math.inf,
            "0 (greedy) or at least 0.001",
        ),
        ("--seed", args.seed, 0 <= args.seed < 2**63 - args.samples, "at least 0, below 2**63"),
        ("--top-k", args.top_k, args.top_k is None or args.top_k >= 1, "at least 1"),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "in (0, 1]"),
        ("--stop", "''", all(args.stop), "a text of at least one character"),
    ):
        if not fits:
            raise UserError(f"{name} {value}: must be {allowed}")
