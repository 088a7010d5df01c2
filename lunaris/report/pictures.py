"""The charts of a report as PNG files, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lunaris.errors import UserError
from lunaris.metrics.plot import plot_loss
from lunaris.report.page import Chart
from lunaris.report.record import RunRecord

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#7a3b00")
_DASHES = {"solid": "-", "dot": ":", "dash": "--"}
_BALANCE = LinearSegmentedColormap.from_list("balance", ["#b35806", "#f2f2f2", "#2166ac"])
_DRAWN = ("scatter", "heatmap")


def write_pictures(
    charts: list[Chart], folder: Path, record: RunRecord | None = None
) -> list[Path]:
    """Draw each chart of lines, points or a heat map to `folder`/ID.png; return the files.

    Of a chart with several views, the first is drawn. record: of a run, whose loss is drawn as in
    its own loss.png. Raises UserError where the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            path = folder / f"{chart.id}.png"
            if record is not None and chart.id == "loss":
                marks = {change.step: str(change) for change in record.changes}
                plot_loss(record.path / "metrics.jsonl", path, marks)
            elif all(trace["type"] in _DRAWN for trace in chart.views[0].traces):
                _draw(chart, path)
            else:
                continue
            written.append(path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    return written


def _draw(chart: Chart, path: Path) -> None:
    figure = Figure(figsize=(8, max(4.0, chart.height / 80)), layout="constrained")
    axes = figure.subplots()
    view = chart.views[0]
    for trace in view.traces:
        (_heat_map if trace["type"] == "heatmap" else _line)(axes, trace)
    for shape in chart.layout.get("shapes", []):
        text = shape.get("label", {}).get("text", "")
        if shape.get("yref") == "paper":
            axes.axvline(shape["x0"], color="grey", linestyle="--", linewidth=1)
            axes.text(shape["x0"], 1.01, text, transform=axes.get_xaxis_transform(), fontsize=8)
        else:
            axes.axhline(shape["y0"], color="grey", linestyle="--", linewidth=1, label=text)
    if chart.layout.get("showlegend"):
        axes.legend(fontsize=8)
    axes.set_title(f"{chart.title}, {view.label}" if view.label else chart.title)
    axes.set_xlabel(_title(chart, "xaxis"))
    axes.set_ylabel(_title(chart, "yaxis"))
    if chart.layout.get("xaxis", {}).get("type") == "log":
        axes.set_xscale("log")
    figure.savefig(path, dpi=120)


def _line(axes: Axes, trace: dict[str, Any]) -> None:
    given = trace.get("color", 0)
    color = _COLORS[given % 8] if isinstance(given, int) else colormaps["cividis"](0.9 * given)
    values = [np.nan if value is None else value for value in trace["y"]]
    if trace.get("fill"):
        axes.fill(trace["x"], values, color=color, alpha=0.2, linewidth=0)
        return
    style = _DASHES[trace.get("line", {}).get("dash", "solid")]
    axes.plot(
        trace["x"],
        values,
        linestyle=style if "lines" in trace["mode"] else "",
        marker="o" if "markers" in trace["mode"] else "",
        markersize=4,
        color=color,
        label=trace.get("name"),
    )
    axes.grid(alpha=0.3)


def _heat_map(axes: Axes, trace: dict[str, Any]) -> None:
    columns = max((len(line) for line in trace["z"]), default=0)
    z = np.full((len(trace["z"]), columns), np.nan)
    for i, line in enumerate(trace["z"]):
        z[i, : len(line)] = [np.nan if value is None else value for value in line]
    named = trace["colorscale"] in ("balance", "overload")
    image = axes.imshow(
        z,
        aspect="auto",
        interpolation="nearest",
        cmap=_BALANCE if named else "cividis",
        vmin=trace.get("zmin"),
        vmax=2 if named else trace.get("zmax"),
    )
    if "y" in trace:
        axes.set_yticks(range(len(trace["y"])), trace["y"])
    if "x" in trace:
        shown = np.unique(np.linspace(0, columns - 1, min(columns, 8)).round().astype(int))
        axes.set_xticks(shown, [trace["x"][i] for i in shown])
    axes.figure.colorbar(image, ax=axes)


def _title(chart: Chart, axis: str) -> str:
    return str(chart.layout.get(axis, {}).get("title", {}).get("text", ""))
