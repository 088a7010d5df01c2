"""Peak memory a process of sharded training against replicated training, at several world sizes.

    python tests/benchmarks/fsdp_memory.py
    python tests/benchmarks/fsdp_memory.py --processes 1 2 4 8 --layers 24
    python tests/benchmarks/fsdp_memory.py --device cuda --processes 1 2 4 8

Trains three steps of a dense model in float32. State is a process's part of parameters,
gradients and AdamW's moments; peak is the resident set (CPU) or the allocator's peak (CUDA) above
what the process took before the model was built; the ratio is against one process, replicated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from processes import SMALL_CACHES, run_group
from torch.distributed.tensor import DTensor

from lunaris.distributed import collectives, session
from lunaris.metrics.throughput import peak_memory_gb
from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.layers import ModelShape
from lunaris.model.transformer import Transformer
from lunaris.moe.factory import DenseFactory
from lunaris.objective.next_token import NextToken
from lunaris.optim.adamw import build_adamw
from lunaris.optim.clip import clip_grad_norm
from lunaris.parallelism.base import Parallelism
from lunaris.parallelism.ddp import DDP
from lunaris.parallelism.fsdp import FSDP
from lunaris.precision import Precision

_STEPS, _SEQ_LEN, _VOCAB = 3, 128, 1024


def main() -> None:
    args = _parser().parse_args()
    if args.worker:
        _worker(args)
        return
    print("parallelism  processes  state MiB/process  peak MiB/process  ratio")
    whole = None
    for parallelism in ("ddp", "fsdp"):
        for processes in args.processes:
            found = _measure(parallelism, processes, args)
            state, peak = max(r["state"] for r in found), max(r["peak"] for r in found)
            whole = whole or peak
            row = f"{parallelism:<11}  {processes:>9}  {state:>17.0f}  {peak:>16.0f}"
            print(f"{row}  {peak / whole:>5.2f}", flush=True)


def _measure(parallelism: str, processes: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return each process's state and peak in MiB."""
    command = [sys.executable, str(Path(__file__)), "--worker", parallelism]
    command += ["--device", args.device or "", "--layers", str(args.layers)]
    command += ["--width", str(args.width)]
    found: list[dict[str, float]] = run_group(command, processes, SMALL_CACHES)
    return found


def _worker(args: argparse.Namespace) -> None:
    with session.join(args.device or None, 600.0):
        parallelism: Parallelism = FSDP() if args.worker == "fsdp" else DDP()
        result = _train(parallelism, args)
        found = collectives.gather_objects(result)
        if parallelism.is_writer:
            print(json.dumps(found))


def _train(parallelism: Parallelism, args: argparse.Namespace) -> dict[str, float]:
    device = parallelism.device
    gc.collect()
    before = _now_mib(device)
    shape = ModelShape(
        d_model=args.width, n_layers=args.layers, n_heads=8, n_kv_heads=8, max_seq_len=_SEQ_LEN,
        rope_theta=1e4, dropout=0.0, ffn_hidden_multiplier=4.0, multiple_of=32, norm="pre",
    )  # fmt: skip
    with torch.device("meta"):
        bare = Transformer(
            shape, vocab_size=_VOCAB, tie_embeddings=True, attention=GQAFactory(),
            feed_forward=DenseFactory(),
        )  # fmt: skip
    model = parallelism.wrap(bare, precision=Precision("fp32", device), seed=0, compile=False)
    optimizer = build_adamw(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
    )
    tokens = torch.randint(_VOCAB, (1, _SEQ_LEN + 1), device=device)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    for _ in range(_STEPS):
        optimizer.zero_grad()
        with parallelism.micro_step(model, last=True):
            NextToken()(model, batch).total.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    held += [tensor for p in model.parameters() for tensor in (p, p.grad)]
    state = sum(_bytes(tensor) for tensor in held) / 2**20
    return {"state": state, "peak": peak_memory_gb(device) * 1024 - before}


def _bytes(tensor: Any) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _now_mib(device: torch.device) -> float:
    """Return the memory in use now, of the same kind as `peak_memory_gb`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
