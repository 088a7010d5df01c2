"""The best learning rate at several widths, in the standard parametrization and in mup.

    python tests/benchmarks/transfer.py [OVERRIDE …] [--widths N …] [--exponents N …] [--seed N]

Trains dense models on the source text of Python that differ in `model.d_model`, with heads of one
width, at rates that are powers of two. At the base width both parametrizations are one. Each point
is appended to results/transfer.jsonl with its overrides; points that are there already are not
trained again. It prints the table and draws docs/transfer.png. OVERRIDE goes to every point.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import lunaris

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "transfer.jsonl"
FIGURE = HERE.parent.parent / "docs" / "transfer.png"
BASE_WIDTH, HEAD_WIDTH = 64, 32
COMMON = (
    "moe=none optimizer=adamw model.n_layers=2 model.max_seq_len=128 data.vocab_size=1024 "
    "trainer.batch_size=4 "
    "trainer.max_steps=100 schedule.warmup_steps=10 trainer.eval_interval=null "
    "trainer.eval_steps=32 trainer.precision=fp32 trainer.device=cpu trainer.log_interval=20 "
    "checkpoint.save_interval=100000"
)
PARAMETRIZATIONS = ("standard", "mup")

Point = dict[str, Any]


def points(widths: list[int], exponents: list[int]) -> Iterator[Point]:
    """Yield what is to be trained, all widths of a rate before the next rate."""
    for exponent in exponents:
        for width in widths:
            for parametrization in PARAMETRIZATIONS[: 1 if width == BASE_WIDTH else 2]:
                yield {"parametrization": parametrization, "width": width, "exponent": exponent}


def overrides_of(point: Point, seed: int, further: list[str]) -> list[str]:
    """Return the overrides of a point."""
    heads = point["width"] // HEAD_WIDTH
    return [
        *COMMON.split(),
        f"model.d_model={point['width']}",
        f"model.n_heads={heads}",
        f"model.n_kv_heads={heads}",
        f"model.parametrization={point['parametrization']}",
        f"model.mup_base_width={BASE_WIDTH}",
        f"model.mup_base_head_width={HEAD_WIDTH}",
        f"optimizer.learning_rate={2.0 ** point['exponent']}",
        f"seed={seed}",
        *further,
    ]


def train_point(overrides: list[str]) -> dict[str, float]:
    """Train a run in a temporary folder; return its last validation loss and its CPU time."""
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        lunaris.train([*overrides, "name=point", f"out_dir={folder}/point"])
        rows = [json.loads(line) for line in open(f"{folder}/point/metrics.jsonl")]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    return {"val_loss": losses[-1], "cpu_s": round(time.process_time() - begin, 1)}


def read_results() -> list[Point]:
    """Return the points that were trained already."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def losses_of(results: list[Point], parametrization: str, width: int) -> dict[int, float]:
    """Return the validation loss by exponent of the rate; both are one at the base width."""
    wanted = (width, "standard" if width == BASE_WIDTH else parametrization)
    found = {
        p["exponent"]: p["val_loss"]
        for p in results
        if (p["width"], p["parametrization"]) == wanted
    }
    return dict(sorted(found.items()))


def print_table(results: list[Point]) -> None:
    """Print the losses of both parametrizations, the least of each width marked."""
    exponents = sorted({point["exponent"] for point in results})
    widths = sorted({point["width"] for point in results})
    for parametrization in PARAMETRIZATIONS:
        print(f"\n| {parametrization} | " + " | ".join(f"2^{e}" for e in exponents) + " |")
        print("|---" * (len(exponents) + 1) + "|")
        for width in widths:
            losses = losses_of(results, parametrization, width)
            cells = []
            for exponent in exponents:
                loss = losses.get(exponent)
                text = "" if loss is None else f"{loss:.3f}"
                cells.append(f"**{text}**" if loss == min(losses.values()) else text)
            print(f"| {width} | " + " | ".join(cells) + " |")


def draw(results: list[Point]) -> None:
    """Draw the loss over the rate, a line a width and a panel a parametrization, to FIGURE."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, parametrization in zip(panels, PARAMETRIZATIONS, strict=True):
        for number, width in enumerate(sorted({point["width"] for point in results})):
            losses = losses_of(results, parametrization, width)
            color = f"C{number}"
            rates = [2.0**exponent for exponent in losses]
            axes.plot(rates, list(losses.values()), "o-", color=color, label=f"d_model {width}")
            best = min(losses, key=lambda exponent: losses[exponent])
            axes.plot(2.0**best, losses[best], "*", color=color, markersize=14)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("optimizer.learning_rate")
        axes.set_title(f"model.parametrization={parametrization}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats a token)")
    panels[0].legend()
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Train what is missing, print and draw all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--exponents", nargs="+", type=int, default=[-7, -6, -8, -5, -9, -4])
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    command = shlex.join(["python", "tests/benchmarks/transfer.py", *sys.argv[1:]])
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    RESULTS.parent.mkdir(exist_ok=True)
    for point in points(args.widths, args.exponents):
        if any(point.items() <= done.items() for done in read_results()):
            continue
        overrides = overrides_of(point, args.seed, args.overrides)
        found = train_point(overrides)
        facts = {"seed": args.seed, "commit": commit, "torch": torch.__version__}
        row = point | found | facts | {"command": command, "overrides": " ".join(overrides)}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(point, found, flush=True)
    print_table(read_results())
    draw(read_results())


if __name__ == "__main__":
    main()
