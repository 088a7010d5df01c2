"""The curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lunaris.metrics.records import read_rows


def plot_loss(metrics: Path, png: Path) -> None:
    """Draw training and validation loss (nats a token) over steps from metrics.jsonl to `png`.

    Also the smallest and largest share of tokens that any expert got, where there are experts.
    """
    rows = read_rows(metrics)
    has_experts = any("moe/min_load" in row for row in rows)
    figure = Figure(figsize=(8, 6 if has_experts else 4), layout="constrained")
    axes = figure.subplots(1 + has_experts, 1, sharex=True, squeeze=False)[:, 0]
    for key, label, style in (
        ("train/main_loss", "training", "-"),
        ("val/loss", "validation", "o-"),
    ):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes[0].plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes[0].set_ylabel("cross-entropy (nats a token)")
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    if has_experts:
        for key, label in (("moe/max_load", "busiest expert"), ("moe/min_load", "idlest expert")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axes[1].plot(*zip(*points, strict=True), label=label)
        axes[1].set_ylabel("share of tokens, 1 = balanced")
        axes[1].legend()
        axes[1].grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(png, dpi=120)
