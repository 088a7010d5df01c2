"""The loss curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lunaris.metrics.records import Row, read_rows

_LONGEST_MARK = 70


def plot_loss(metrics: Path, png: Path, marks: Mapping[int, str] | None = None) -> None:
    """Draw the training and validation loss (nats a token) of `metrics.jsonl` to the file `png`.

    A run with experts gets a second plot: the largest and smallest share of tokens of any expert.
    marks: steps at which the config changed, each with a text; a vertical line shows them.
    """
    rows = read_rows(metrics)
    has_experts = any("moe/min_load" in row for row in rows)
    figure = Figure(figsize=(8, 6 if has_experts else 4), layout="constrained")
    axes = figure.subplots(1 + has_experts, 1, sharex=True, squeeze=False)[:, 0]
    _draw(axes[0], rows, "train/main_loss", "training", "-")
    _draw(axes[0], rows, "val/loss", "validation", "o-")
    axes[0].set_ylabel("cross-entropy (nats a token)")
    if has_experts:
        _draw(axes[1], rows, "moe/max_load", "busiest expert", "-")
        _draw(axes[1], rows, "moe/min_load", "idlest expert", "-")
        axes[1].set_ylabel("share of tokens, 1 = balanced")
    for step, text in (marks or {}).items():
        shown = text if len(text) <= _LONGEST_MARK else f"{text[: _LONGEST_MARK - 1]}…"
        axes[0].axvline(step, color="grey", linestyle="--", label=f"step {step}: {shown}")
        if has_experts:
            axes[1].axvline(step, color="grey", linestyle="--")
    for part in axes:
        part.legend()
        part.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(png, dpi=120)


def _draw(axes: Axes, rows: list[Row], key: str, label: str, style: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
