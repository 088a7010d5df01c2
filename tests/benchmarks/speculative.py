"""Tokens a second of generation with and without drafts, from a run of `objective=multi_token`.

    python tests/benchmarks/speculative.py RUN [--tokens N] [--texts N] [--rounds N]

Both ways sample the same texts after the same prompts, taken from the run's validation part, and
take turns; the best of the rounds counts. It prints their speeds, their ratio, and how many tokens
a forward of the model gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lunaris.config.instantiate import instantiate_component
from lunaris.data.prepare.build import make_ready
from lunaris.distributed import session
from lunaris.inference import load_trained
from lunaris.model.generate import stream
from lunaris.model.speculative import stream_ahead
from lunaris.runs.run_dir import RunDir

Generate = Callable[..., Iterator[Tensor]]
PROMPT = 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--tokens", type=int, default=96, help="tokens a text (default: 96)")
    parser.add_argument("--texts", type=int, default=6, help="texts a round (default: 6)")
    parser.add_argument("--rounds", type=int, default=3, help="the best counts (default: 3)")
    args = parser.parse_args()
    run_dir = RunDir(args.run)
    cfg = run_dir.read_config()
    with session.join("cpu", 600.0):
        data = instantiate_component("data", cfg.data)
        make_ready(data)
        model, step = load_trained(cfg, run_dir, None, predictors=True)
        head = instantiate_component("objective", cfg.objective).logits
    prompts = prompts_of(data, args.texts, cfg.seed)
    print(f"step {step}, {len(model.predictors)} depths, threads {torch.get_num_threads()}")
    for temperature in (0.0, 0.8):
        keys = {"temperature": temperature, "head": head}
        forwards = count_forwards(model, prompts, args.tokens, keys)
        times: dict[Generate, list[float]] = {stream: [], stream_ahead: []}
        for _ in range(args.rounds + 1):  # The first is a warm-up.
            for generate, found in times.items():
                began = time.process_time()
                sample(generate, model, prompts, args.tokens, keys)
                found.append(time.process_time() - began)
        plain, drafted = (min(found[1:]) for found in times.values())
        tokens = args.texts * args.tokens
        print(
            f"temperature {temperature}: {tokens / plain:.0f} tokens/s, with drafts "
            f"{tokens / drafted:.0f}, ratio {plain / drafted:.2f}; "
            f"{tokens / forwards:.2f} tokens a forward"
        )


def prompts_of(data: Any, texts: int, seed: int) -> list[Tensor]:
    """Return the first tokens of sequences of the validation part, [1, PROMPT] int64 each."""
    sequences = next(iter(data.val(PROMPT).values()))
    rows = torch.empty(texts, PROMPT + 1, dtype=torch.int64)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    sequences.gather(order[:texts].numpy(), rows.numpy())
    return list(torch.where(rows < 0, ~rows, rows)[:, :PROMPT].split(1))


def sample(
    generate: Generate, model: Any, prompts: list[Tensor], tokens: int, keys: dict[str, Any]
) -> list[list[int]]:
    """Return the texts that continue the prompts."""
    return [[int(t) for t in generate(model, prompt, tokens, **keys)] for prompt in prompts]


def count_forwards(model: Any, prompts: list[Tensor], tokens: int, keys: dict[str, Any]) -> int:
    """Return how many forwards of the model the drafted texts take; they must be the plain ones."""
    plain = sample(stream, model, prompts, tokens, keys)
    seen: list[None] = []
    with model.register_forward_pre_hook(lambda *_: seen.append(None)):
        drafted = sample(stream_ahead, model, prompts, tokens, keys)
    same = sum(a == b for a, b in zip(plain, drafted, strict=True))
    print(f"temperature {keys['temperature']}: {same} of {len(prompts)} texts are the same")
    return len(seen)


if __name__ == "__main__":
    main()
