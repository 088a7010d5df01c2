"""Pace and memory of `lunaris prepare` against the bare tokenizers library.

    python tests/benchmarks/prepare.py                     # pace, on 24 MB of text
    python tests/benchmarks/prepare.py --mb 200 --rounds 3
    python tests/benchmarks/prepare.py --memory 10,100,1000   # peak memory by size (MB)

Pace: in turn, on the same text in the same run, the bare `Tokenizer.encode_batch` on one thread,
and whole preparations by one and two processes, from files to shards. The ratio is prepare's bytes
a second to those of the bare encoder times processes: 1.00 would be no cost at all. With --pool the
bare encoder runs in as many processes at once as the preparation, which takes out what the machine
itself loses when all its processors work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("jsonl", "txt", "jsonl.gz")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=24, help="text for the pace")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--kind", choices=KINDS, default="jsonl")
    parser.add_argument("--pool", action="store_true", help="bare encoder in several processes")
    parser.add_argument("--memory", metavar="MB,MB", help="print peak memory by size instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tokenizer()
        if args.memory:
            memory([float(mb) for mb in args.memory.split(",")], args.kind)
        else:
            pace(args)


def documents(size: int) -> list[bytes]:
    """Return about `size` bytes of English-like text and code: the standard library, shuffled."""
    from lunaris.data.stdlib import library_files

    parts = []
    for path in library_files():
        text = path.read_bytes()
        parts += [text[i : i + 4000] for i in range(0, len(text), 4000)]
    draw = random.Random(0)
    out: list[bytes] = []
    held = 0
    while held < size:
        part = draw.choice(parts).decode("utf-8", "ignore").encode()
        out.append(part)
        held += len(part)
    return out


def make_tokenizer() -> None:
    from lunaris.data.prepare.folder_tokenizer import train_bpe

    train_bpe((text.decode() for text in documents(8_000_000)), 8192, Path("tokenizer.json"))


def write_corpus(kind: str, texts: list[bytes], path: str = "corpus") -> str:
    import gzip

    name = f"{path}.{kind}"
    if kind == "txt":
        Path(name).write_bytes(b"".join(texts))
        return name
    lines = (json.dumps({"text": text.decode()}).encode() + b"\n" for text in texts)
    with gzip.open(name, "wb", 1) if kind.endswith("gz") else open(name, "wb") as file:
        file.writelines(lines)
    return name


def bare(texts: list[bytes]) -> float:
    """Return the seconds that `encode_batch` takes on one thread, batches of 1,000 documents."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file("tokenizer.json")
    strings = [text.decode() for text in texts]
    began = time.perf_counter()
    for i in range(0, len(strings), 1000):
        tokenizer.encode_batch(strings[i : i + 1000])
    return time.perf_counter() - began


def bare_pool(texts: list[bytes], processes: int) -> float:
    """Return the mean seconds of one process's `encode_batch` while so many run at once."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(bare, [texts[:50]] * processes)
        return statistics.mean(pool.map(bare, [texts] * processes))


class Prepared:
    """What one `lunaris prepare` printed and took: seconds, tokens, peak bytes of one process."""

    def __init__(self, name: str, processes: int) -> None:
        subprocess.run(["rm", "-rf", "out"], check=True)
        command = [
            *(sys.executable, "-m", "lunaris", "prepare", "data=text", "data.dir=out"),
            *(f"data.files=[{name}]", "data.tokenizer=tokenizer.json"),
            f"data.processes={processes}",
        ]
        before = children_cpu_s()
        done = subprocess.run(command, capture_output=True, text=True)
        self.cpu_s = children_cpu_s() - before
        if done.returncode:
            raise SystemExit(done.stderr)
        found = re.search(r"([\d,]+) tokens of ([\d,]+) bytes", done.stdout)
        timed = re.search(r"\(([\d.]+) s\)", done.stdout)
        assert found and timed, done.stdout
        self.seconds = float(timed[1])
        self.tokens, self.bytes = (int(group.replace(",", "")) for group in found.groups())
        # The largest of all children so far, which is why sizes are measured in ascending order.
        self.peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pace(args: argparse.Namespace) -> None:
    texts = documents(int(args.mb * 1e6))
    size = sum(map(len, texts))
    name = write_corpus(args.kind, texts)
    counts = [int(n) for n in args.processes.split(",")]
    bare_s: list[float] = []
    bare_cpu_s: list[float] = []
    pool_s: dict[int, list[float]] = {n: [] for n in counts}
    ours: dict[int, list[Prepared]] = {n: [] for n in counts}
    for _ in range(args.rounds):
        began = time.process_time()
        bare_s.append(bare(texts))
        bare_cpu_s.append(time.process_time() - began)
        for n in counts:
            ours[n].append(Prepared(name, n))
            if args.pool:
                pool_s[n].append(bare_pool(texts, n))
    reference = statistics.median(bare_s)
    tokens = ours[counts[0]][0].tokens
    print(f"{size / 1e6:.1f} MB of text as {args.kind}, {tokens:,} tokens, {args.rounds} rounds")
    print(f"bare encode_batch      {row(size, tokens, reference)}")
    for n in counts:
        seconds = statistics.median(run.seconds for run in ours[n])
        print(f"prepare, {n} process(es) {row(size, tokens, seconds)}", end="")
        cpu = statistics.median(bare_cpu_s) / statistics.median(run.cpu_s for run in ours[n])
        print(f"   ratio {reference / seconds / n:.2f} of bare × {n}", end="")
        print(f", {cpu:.2f} by CPU seconds", end="")
        if args.pool:
            together = statistics.median(pool_s[n])
            print(f", {together / seconds / n:.2f} of {n} bare at once", end="")
        print()


def row(size: int, tokens: int, seconds: float) -> str:
    return f"{size / seconds / 1e6:6.2f} MB/s {tokens / seconds / 1e6:6.3f} M tokens/s"


def memory(sizes_mb: list[float], kind: str) -> None:
    """Print the peak resident memory of the largest process of a preparation, by size of text."""
    base = documents(10_000_000)
    for mb in sorted(sizes_mb):
        count = max(1, round(mb / 10))
        name = f"corpus.{kind}"
        part = write_corpus(kind, base if mb >= 10 else documents(int(mb * 1e6)), "part")
        with open(name, "wb") as file:
            content = Path(part).read_bytes()
            for _ in range(count):
                file.write(content)
        done = Prepared(name, 2)
        print(
            f"{mb:7.0f} MB of {kind}: peak {done.peak_mb:6.0f} MB of memory a process, "
            f"{row(done.bytes, done.tokens, done.seconds)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
