"""Tokens a second of the loader against a torch DataLoader over a memory-mapped dataset.

    python tests/benchmarks/loader.py
    python tests/benchmarks/loader.py --tokens 2e9 --seq-len 4096
    python tests/benchmarks/loader.py --step        # and the share of a default training step

All read sequences of one folder of uint16 shards in random order as int64 batches, in turn, several
rounds in one run; the ratio is of the medians. Prints one line a way to load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lunaris.data.loader import Loader
from lunaris.data.shards import ShardsData


class MemmapDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What one writes by hand: item i is tokens [i·L, i·L + L + 1) of one memory map."""

    def __init__(self, path: Path, seq_len: int) -> None:
        self._tokens = np.load(path, mmap_mode="r")
        self._seq_len = seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = i * self._seq_len
        row = torch.from_numpy(self._tokens[start : start + self._seq_len + 1].astype(np.int64))
        return row[:-1], row[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=5e7, help="size of the corpus")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=300, help="timed batches a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true", help="also train 30 steps of the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args)
        if args.step:
            share_of_a_step(Path(folder))


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Print tokens a second of each way to load, and the loader's ratio to each other one."""
    corpus = folder / "corpus"
    corpus.mkdir()
    random = np.random.default_rng(0)
    np.save(corpus / "0.npy", random.integers(0, 50_000, int(args.tokens), dtype=np.uint16))
    ways: dict[str, Callable[[], Iterator[object]]] = {
        "lunaris Loader": lambda: lunaris_batches(corpus, args),
        "DataLoader, 0 workers": lambda: torch_batches(corpus, args, 0),
        "DataLoader, 2 workers": lambda: torch_batches(corpus, args, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, make in ways.items():
            seconds[name].append(timed(make(), args.batches))
    tokens = args.batches * args.batch_size * args.seq_len
    ours = statistics.median(seconds["lunaris Loader"])
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{tokens / max(times) / 1e6:.1f} to {tokens / min(times) / 1e6:.1f}"
        print(
            f"{name:<22} {tokens / median / 1e6:8.1f} M tokens/s ({spread})"
            f"   Loader is {median / ours:.2f} times as fast"
        )


def timed(batches: Iterator[object], count: int) -> float:
    """Return the seconds that `count` batches take once the first ones are there."""
    for _ in range(10):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - began


def lunaris_batches(corpus: Path, args: argparse.Namespace) -> Iterator[object]:
    data = ShardsData(dir=str(corpus), val_fraction=0)
    data.ensure_ready()
    loader = Loader(
        data.train(args.seq_len, seed=0), batch_size=args.batch_size, vocab_size=data.vocab_size
    )
    try:
        yield from loader
    finally:
        loader.close()


def torch_batches(corpus: Path, args: argparse.Namespace, workers: int) -> Iterator[object]:
    dataset = MemmapDataset(corpus / "0.npy", args.seq_len)
    while True:
        yield from DataLoader(
            dataset,
            args.batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            generator=torch.Generator().manual_seed(0),
        )


def share_of_a_step(folder: Path) -> None:
    """Print how much of a default training step waits for data, and what gathering it takes."""
    out = folder / "run"
    command = [sys.executable, "-m", "lunaris", "train", f"out_dir={out}", "trainer.max_steps=30"]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "perf/data_wait" in row]
    last = rows[-1]
    rate = last["perf/tokens_per_s"]
    print(
        f"default training: {rate:,.0f} tokens/s, {100 * last['perf/data_wait']:.3f} % of the time "
        "is spent waiting for data"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
