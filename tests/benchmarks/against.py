"""Speed of a training step against Hugging Face's Qwen3-MoE and against our own dense twin.

    python tests/benchmarks/against.py [OVERRIDE …] [--steps N] [--rounds N] [--arms ours hf …]

Every arm is a process of its own, and all take turns. `ours` is the run of the overrides (without
any: width 256, 4 layers, 8 experts, 2,048 tokens of a vocabulary of 4,096); `dense` the same with
`moe=none`; `hf` transformers' Qwen3-MoE of the same shape, with grouped products, its own loss,
clipping and torch's fused AdamW, in the same precision; `floor` the bare matrix products of a step,
attention's left out, and one step of the optimizer. Prints tokens a CPU second (user and system)
and, for each other arm, the median of the paired ratios `ours` / arm with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

ARMS = ("ours", "dense", "hf", "floor")
SHAPE = [
    "model.d_model=256", "model.n_layers=4", "model.n_heads=8", "model.n_kv_heads=2",
    "model.max_seq_len=256", "model.ffn_hidden_multiplier=4.5", "trainer.batch_size=8",
    "data=synthetic", "data.vocab_size=4096", "data.n_tokens=400000", "trainer.device=cpu",
    "optimizer=adamw",
]  # fmt: skip


class Arm(NamedTuple):
    """What one process measures: a name for the output, which of ARMS it is, and its overrides."""

    name: str
    kind: str
    overrides: list[str]


class Ratio(NamedTuple):
    """The paired ratios of two arms' speeds: median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def main() -> None:
    """Start the arms, or be one of them; print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ours", "dense", "hf"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    overrides = args.overrides or [*SHAPE, "moe=switch", "moe.n_experts=8"]
    if args.one:
        serve(overrides, args.one)
        return
    speeds = measure([Arm(kind, kind, overrides) for kind in args.arms], args.steps, args.rounds)
    found: dict[str, dict[str, Any]] = {}
    for kind, each in speeds.items():
        found[kind] = {"tokens_per_cpu_s": median(each)}
        line = f"{kind:<6} {median(each):9,.0f} tokens per CPU second"
        if kind != "ours" and "ours" in speeds:
            ratio = compare(speeds["ours"], each)
            found[kind]["ours_over_this"] = ratio._asdict()
            line += f"   ours/{kind} {ratio}"
        if not args.json:
            print(line)
    if args.json:
        print(json.dumps({"overrides": overrides, "arms": found}, indent=2))


def measure(arms: Sequence[Arm], steps: int, rounds: int) -> dict[str, list[float]]:
    """Return the speed of each arm (tokens a CPU second) in every round; all take turns."""
    processes = {arm.name: start(arm) for arm in arms}
    speeds: dict[str, list[float]] = {name: [] for name in processes}
    tokens = {name: int(answer(process)) for name, process in processes.items()}
    for _ in range(rounds):
        for name, process in processes.items():
            speeds[name].append(tokens[name] * steps / float(ask(process, steps)))
    for process in processes.values():
        process.communicate()
    return speeds


def compare(ours: list[float], other: list[float]) -> Ratio:
    """Return the ratios of speeds that were measured in the same rounds."""
    low, middle, high = quantiles(
        [a / b for a, b in zip(ours, other, strict=True)], n=4, method="inclusive"
    )
    return Ratio(middle, low, high)


def start(arm: Arm) -> subprocess.Popen[str]:
    """Start the process of an arm."""
    command = [sys.executable, __file__, *arm.overrides, "--one", arm.kind]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], steps: int) -> str:
    """Let an arm take steps and return its CPU time (s)."""
    assert process.stdin
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> str:
    """Return the next line of an arm that begins with `= `."""
    assert process.stdout and process.stderr
    for line in process.stdout:
        if line.startswith("= "):
            return line[2:]
    raise SystemExit(process.stderr.read() or "an arm ended before it answered")


def serve(overrides: list[str], kind: str) -> None:
    """Be one arm: say the tokens of a step, then the CPU time of as many steps as asked for."""
    if kind != "hf":
        from lunaris.launch.allocator import keep_freed_memory

        keep_freed_memory("cpu")
    from built import built_run, cpu_seconds

    if kind == "dense":
        overrides = [*(text for text in overrides if not text.startswith("moe")), "moe=none"]
    with built_run(overrides) as run:
        step = {"hf": transformers_step, "floor": floor_step}.get(kind, our_step)(run)
        for _ in range(2):
            step()
        print(f"= {run.global_batch * run.cfg.model.max_seq_len}", flush=True)
        for line in sys.stdin:
            print(f"= {cpu_seconds(step, int(line)) * int(line)}", flush=True)


def our_step(run: Any) -> Callable[[], object]:
    """Return a training step of a run."""
    from lunaris.train import train_step

    batches = iter(run.loader)
    return lambda: train_step(run, next(batches))


def floor_step(run: Any) -> Callable[[], object]:
    """Return the products of a step and one step of the optimizer, over gradients of zero."""
    import torch
    from step import bare_products

    products = bare_products(run)
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        products()
        run.optimizer.step()

    return step


def transformers_step(run: Any) -> Callable[[], object]:
    """Return a training step of a Qwen3-MoE of the run's shape, over the run's batches."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from lunaris.parallelism.base import unwrap

    keys, moe, trainer = run.cfg.model, run.cfg.moe, run.cfg.trainer
    down = next(p for name, p in unwrap(run.model).named_parameters() if "experts.down" in name)
    model = Qwen3MoeForCausalLM._from_config(
        Qwen3MoeConfig(
            vocab_size=unwrap(run.model).vocab_size,
            hidden_size=keys.d_model, num_hidden_layers=keys.n_layers,
            num_attention_heads=keys.n_heads, num_key_value_heads=keys.n_kv_heads,
            head_dim=keys.d_model // keys.n_heads, max_position_embeddings=keys.max_seq_len,
            moe_intermediate_size=down.shape[1], intermediate_size=down.shape[1],
            num_experts=moe.n_experts, num_experts_per_tok=moe.n_experts_per_token,
            output_router_logits=True, tie_word_embeddings=True, use_cache=False,
        ),
        attn_implementation="sdpa", experts_implementation="grouped_mm",
    )  # fmt: skip
    run.optimizer = None  # Its state would take memory.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    batches = iter(run.loader)
    half = trainer.precision == "bf16"

    def step() -> None:
        for tokens in next(batches)["tokens"]:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=tokens, labels=tokens).loss
            (loss / trainer.gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
