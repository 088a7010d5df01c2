"""Time of a Mixture-of-Experts layer against a dense SwiGLU of the same active width.

    python tests/benchmarks/moe.py [--d-model N …] [--tokens N] [--rounds N]

Forward and backward of one layer on the CPU, turn by turn with its reference, the best of the
rounds; and torch's grouped_mm against one product an expert on the same tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from lunaris.model.activation import swiglu
from lunaris.model.layers import ModelShape
from lunaris.moe.experts import Experts, grouped_product, one_product_each
from lunaris.moe.factory import DenseFactory, MoEFactory
from lunaris.moe.router.softmax import SoftmaxRouterFactory

CASES = {
    "switch, 8 experts": ({"n_experts": 8, "n_experts_per_token": 1}, 1.0),
    "switch, 8 experts, capacity 1.25": (
        {"n_experts": 8, "n_experts_per_token": 1, "capacity_factor": 1.25},
        1.0,
    ),
    "top-2 of 8, half width": ({"n_experts": 8, "n_experts_per_token": 2}, 0.5),
    "top-3 of 16 and 1 shared, quarter width, bias": (
        {
            "n_experts": 16,
            "n_experts_per_token": 3,
            "n_shared_experts": 1,
            "balancing": "bias",
        },
        0.25,
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--tokens", type=int, default=4096, help="in sequences of 256")
    parser.add_argument("--rounds", type=int, default=10, help="the best counts (default: 10)")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"threads {torch.get_num_threads()}, {args.tokens} tokens, float32")
    for d_model in args.d_model:
        shape = ModelShape(
            d_model=d_model, n_layers=4, n_heads=4, n_kv_heads=4, max_seq_len=256, rope_theta=1e4,
            dropout=0.0, ffn_hidden_multiplier=4.0, multiple_of=32, norm="pre",
        )  # fmt: skip
        dense = layer_step(DenseFactory()(0, shape), d_model, args.tokens)
        for name, (keys, width) in CASES.items():
            factory = MoEFactory(
                router=SoftmaxRouterFactory(), **keys, expert_hidden_multiplier=4.0 * width
            )
            ours, reference = best(
                layer_step(factory(0, shape), d_model, args.tokens), dense, args.rounds
            )
            print(
                f"d={d_model:<4} {name:<46} {ours * 1e3:7.1f} ms   dense {reference * 1e3:7.1f} ms"
                f"   ratio {ours / reference:.2f}"
            )
        grouped, loop = best(*expert_products(d_model, args.tokens), args.rounds)
        print(
            f"d={d_model:<4} {'grouped_mm, 8 experts':<46} {grouped * 1e3:7.1f} ms"
            f"   loop  {loop * 1e3:7.1f} ms   ratio {grouped / loop:.2f}"
        )


def layer_step(layer: nn.Module, d_model: int, tokens: int) -> Callable[[], None]:
    """Return a function that takes a layer forward and backward."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(tokens // 256, 256, d_model, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        y, stats = layer(x)
        losses = [y, stats.loss] if stats is not None else [y]
        torch.autograd.backward(losses, [grad, torch.ones(())][: len(losses)])

    return step


def expert_products(d_model: int, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the two ways through 8 experts, forward and backward, of evenly routed tokens."""
    experts = Experts(8, d_model, 352)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    counts = torch.full((8,), tokens // 8)
    x = torch.randn(tokens, d_model, requires_grad=True)
    grad = torch.randn(tokens, d_model)

    def grouped() -> None:
        grouped_product(x, counts, experts.gate_up, experts.down, swiglu).backward(grad)

    def loop() -> None:
        one_product_each(x, counts, experts.gate_up, experts.down, swiglu).backward(grad)

    return grouped, loop


def best(a: Callable[[], None], b: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Return the shortest times (s) of two actions, measured turn by turn."""
    a(), b()
    times = [(seconds(a), seconds(b)) for _ in range(rounds)]
    first, second = zip(*times, strict=True)
    return min(first), min(second)


def seconds(action: Callable[[], None]) -> float:
    """Return how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
