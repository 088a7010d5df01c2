"""Speed of a training step against Hugging Face's Qwen3-MoE and against our own dense twin.

    python tests/benchmarks/against.py [OVERRIDE …] [--steps N] [--rounds N] [--arms ours hf …]

Every arm is a process of its own, and all take turns: `ours` is the run of the overrides, `dense`
the same with `moe=none`, `hf` transformers' Qwen3-MoE of the same shape, with grouped products,
its own loss, clipping and torch's fused AdamW, in the same precision. Prints tokens a CPU second
(user and system) and, for each other arm, the median of the paired ratios `ours` / arm with its
quartiles.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

ARMS = ("ours", "dense", "hf")


def main() -> None:
    """Start the arms, or be one of them; print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        serve(args.overrides, args.one)
        return
    arms = {arm: start(args.overrides, arm) for arm in args.arms}
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    tokens = {arm: int(answer(process)) for arm, process in arms.items()}
    for _ in range(args.rounds):
        for arm, process in arms.items():
            seconds = float(ask(process, args.steps))
            speeds[arm].append(tokens[arm] * args.steps / seconds)
    for process in arms.values():
        process.communicate()
    for arm, found in speeds.items():
        line = f"{arm:<6} {median(found):9,.0f} tokens per CPU second"
        if arm != "ours" and "ours" in speeds:
            ratios = [ours / other for ours, other in zip(speeds["ours"], found, strict=True)]
            low, middle, high = quantiles(ratios, n=4, method="inclusive")
            line += f"   ours/{arm} {middle:.3f} ({low:.3f} to {high:.3f})"
        print(line)


def start(overrides: list[str], arm: str) -> subprocess.Popen[str]:
    """Start the process of an arm."""
    command = [sys.executable, __file__, *overrides, "--one", arm]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def ask(process: subprocess.Popen[str], steps: int) -> str:
    """Let an arm take steps and return its CPU time (s)."""
    assert process.stdin
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> str:
    """Return the next line of an arm that begins with `= `."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("= "):
            return line[2:]
    raise SystemExit("an arm ended before it answered; its errors are above")


def serve(overrides: list[str], arm: str) -> None:
    """Be one arm: say the tokens of a step, then the CPU time of as many steps as asked for."""
    if arm != "hf":
        from lunaris.launch.allocator import keep_freed_memory

        keep_freed_memory("cpu")
    from built import built_run, cpu_seconds

    if arm == "dense":
        overrides = [*(text for text in overrides if not text.startswith("moe")), "moe=none"]
    with built_run(overrides) as run:
        step = transformers_step(run) if arm == "hf" else our_step(run)
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
