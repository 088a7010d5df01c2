"""Cache and decoding speed of each attention against `gqa`.

    python tests/benchmarks/attention.py [OVERRIDE …] [--context N] [--tokens N] [--rounds N]

One run prints cache bytes a token and decoding tokens/s at a context, of a dense model. The kinds
take turns; the best of the rounds counts. `parts.py` measures their training steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lunaris.config.compose import compose
from lunaris.run import bare_model

KINDS = {
    "gqa": [],
    "sliding_window": ["attention=sliding_window"],
    "mla": ["attention=mla", "model.n_kv_heads=${model.n_heads}"],
    "gqa, gate": ["attention.output_gate=true"],
    "gqa, sinks": ["attention.sinks=true"],
}
DECODED = ["moe=none", "model=small", "model.n_layers=4", "data=synthetic"]
VOCABULARY = 512  # Small: decoding is to be about attention.


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=DECODED, metavar="OVERRIDE")
    parser.add_argument("--context", type=int, default=4096, help="positions in the cache")
    parser.add_argument("--tokens", type=int, default=16, help="tokens a round (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="the best counts (default: 5)")
    args = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, float32, model.norm=pre")
    length = args.context + args.tokens * (args.rounds + 1)
    actions, sizes = {}, {}
    for kind, overrides in KINDS.items():
        common = ["model.norm=pre", f"model.max_seq_len={length}"]
        cfg = compose([*args.overrides, *common, *overrides])
        model = bare_model(cfg, VOCABULARY).to_empty(device="cpu").eval()
        model.init_weights(0)
        actions[kind], cache = decoder(model, args.context, args.tokens)
        sizes[kind] = bytes_of(cache) / length
    times = best(actions, args.rounds, time.perf_counter)
    print(f"decoding at {args.context} positions: {' '.join(args.overrides)}")
    for kind, seconds in times.items():
        speed = args.tokens / seconds
        print(
            f"{kind:<16} cache {sizes[kind]:8,.0f} bytes a token, {sizes[kind] / sizes['gqa']:5.3f}"
            f" of gqa   {speed:7.1f} tokens/s, {times['gqa'] / seconds:5.2f} times gqa"
        )


def decoder(model: Any, context: int, tokens: int) -> tuple[Callable[[], None], Any]:
    """Return a function that decodes `tokens` tokens after `context` others, and its cache."""
    cache = model.new_cache(1)
    generator = torch.Generator().manual_seed(0)
    new = torch.randint(VOCABULARY, (1, context), generator=generator)
    with torch.no_grad():
        model.logits(new, cache=cache)

    @torch.no_grad()
    def decode() -> None:
        token = new[:, -1:]
        for _ in range(tokens):
            token = model.logits(token, cache=cache)[:, -1:].argmax(-1)

    return decode, cache


def bytes_of(cache: Any) -> int:
    """Return the bytes of all tensors of a cache."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def best(
    actions: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the shortest time (s) of each action; they take turns, after one round unmeasured."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            began = clock()
            action()
            found[name].append(clock() - began)
    return {name: min(times[1:]) for name, times in found.items()}


if __name__ == "__main__":
    main()
