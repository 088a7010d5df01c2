"""Line charts of a run's metrics over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lunaris.report.page import Chart, View
from lunaris.report.record import RunRecord

# A line of more points is thinned to this many.
MOST_POINTS = 2000
FROM_ZERO = {"rangemode": "tozero"}

# How far a run has come, which is no chart of its own.
_POSITION = ("train/sequences", "train/tokens", "train/flops")

Trace = dict[str, Any]
# The step of a vertical line, and the text at its top.
Mark = tuple[int, str]


def line(
    name: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    *,
    color: int | float,
    markers: bool = False,
    dash: str = "solid",
    most: int = MOST_POINTS,
) -> Trace:
    """Return a trace. color: the number of a colour, or a float from 0 to 1 on a scale."""
    steps, values = thin(steps, values, most)
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers or len(steps) == 1 else "lines",
        "name": name,
        "x": steps,
        "y": values,
        "color": color,
        "line": {"width": 1.75, "dash": dash},
        "marker": {"size": 5},
    }


def thin(
    steps: Sequence[int], values: Sequence[float | None], most: int
) -> tuple[list[int], list[float | None]]:
    """Return at most `most` of the points: of each stretch the lowest and the highest.

    So no spike is lost. The first, the last, and a gap (None) in each stretch stay.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), max(1, (most - 2) // 3)):
        there = part[~np.isnan(numbers[part])]
        if len(there):
            kept |= {int(there[numbers[there].argmin()]), int(there[numbers[there].argmax()])}
        if len(there) < len(part):
            kept.add(int(part[np.isnan(numbers[part])][0]))
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def step_chart(
    id: str,
    title: str,
    traces: list[Trace],
    *,
    caption: str = "",
    marks: Iterable[Mark] = (),
    level: tuple[float, str] | None = None,
    axis: dict[str, Any] | None = None,
) -> Chart:
    """Return a chart over the steps.

    marks: vertical lines. level: the height and the text of a horizontal line. axis: further
    settings of the vertical axis.
    """
    shapes = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper",
         "label": {"text": text, "textposition": "end", "textangle": 0, "yanchor": "bottom"}}
        for step, text in marks
    ]  # fmt: skip
    if level is not None:
        shapes.append(
            {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": level[0], "y1": level[0],
             "label": {"text": level[1], "textposition": "end", "yanchor": "bottom"}}
        )  # fmt: skip
    few = len(traces) <= 8
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"automargin": True, **(axis or {})},
        "shapes": shapes,
        "showlegend": 1 < len(traces) and few,
        "hovermode": "x unified" if few else "closest",
    }
    return Chart(id, title, [View("", traces)], layout, caption)


def run_charts(record: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    """Return the charts of a run's training: every metric but those of its experts."""
    charts = [*_losses(record, marks)]
    charts += _single(record, "train/lr", "Learning rate", "train/lr", marks)
    clip = record.config.get("trainer.grad_clip")
    level = (float(clip), "clipped above") if isinstance(clip, int | float) else None
    charts += _single(
        record, "train/grad_norm", "Gradient norm", "train/grad_norm: before clipping", marks,
        FROM_ZERO, level,
    )  # fmt: skip
    charts += _single(
        record, "perf/tokens_per_s", "Throughput", "perf/tokens_per_s: tokens a second of all "
        "processes, without evaluating and saving", marks, FROM_ZERO,
    )  # fmt: skip
    share = {"tickformat": ".1%"} | FROM_ZERO
    charts += _single(
        record, "perf/mfu", "Model FLOPs utilisation",
        "perf/mfu: share of the devices' peak FLOP/s", marks, share,
    )  # fmt: skip
    charts += _single(
        record, "perf/data_wait", "Waiting for data", "perf/data_wait: share of the time", marks,
        share,
    )  # fmt: skip
    charts += _memory(record, marks)
    return charts + _skips(record, marks)


def other_charts(record: RunRecord, marks: Sequence[Mark], shown: Iterable[str]) -> list[Chart]:
    """Return a chart for each number that was logged and is not among the keys `shown`."""
    known = {"train/perplexity", "val/perplexity", *_POSITION, *shown}
    keys = dict.fromkeys(
        key
        for row in record.rows
        for key in row
        if key not in known and not key.startswith(("moe/", "perf/", "step"))
    )
    return [chart for key in keys for chart in _single(record, key, key, "", marks)]


def shown_keys(record: RunRecord) -> set[str]:
    """Return the keys that `run_charts` draws."""
    keys = {key for row in record.rows for key in row}
    losses = {key for key in keys if key.startswith(("train/", "val/")) and key.endswith("loss")}
    return losses | {"train/lr", "train/grad_norm", "train/skipped_steps", "train/spikes"}


def _losses(record: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    keys = shown_keys(record)
    traces = []
    main = "train/main_loss" if "train/main_loss" in keys else "train/loss"
    if main in keys:
        traces.append(line("training", *record.scalars(main), color=0))
    sources = sorted(key for key in keys if key.startswith("val/") and key != "val/loss")
    if "val/loss" in keys:
        traces.append(line("validation", *record.scalars("val/loss"), color=1, markers=True))
    for number, key in enumerate(sources, 2):
        name = f"validation: {key.removeprefix('val/').removesuffix('/loss')}"
        traces.append(
            line(name, *record.scalars(key), color=number, markers=True, dash="dot")
        )  # fmt: skip
    charts = []
    if traces:
        caption = (
            f"{main} and val/loss, nats a token. A training loss is the mean since the row before."
        )
        charts.append(step_chart("loss", "Loss", traces, caption=caption, marks=marks))
    parts = sorted(
        key for key in keys if key.startswith("train/") and key.endswith("_loss") and key != main
    )
    if parts:
        names = ["train/loss", *parts] if main != "train/loss" else parts
        traces = [
            line(key.removeprefix("train/"), *record.scalars(key), color=number)
            for number, key in enumerate(names)
            if key in keys
        ]
        caption = "train/loss is the weighted sum that is minimised; the others are its parts."
        charts.append(
            step_chart("parts", "Parts of the loss", traces, caption=caption, marks=marks)
        )
    return charts


def _single(
    record: RunRecord,
    key: str,
    title: str,
    caption: str,
    marks: Sequence[Mark],
    axis: dict[str, Any] | None = None,
    level: tuple[float, str] | None = None,
) -> list[Chart]:
    """Return the chart of one metric, or none where it was never logged as a number."""
    steps, values = record.scalars(key)
    if all(value is None for value in values):
        return []
    trace = line(key, steps, values, color=0)
    chart_id = f"metric-{key.replace('/', '-')}"
    return [
        step_chart(chart_id, title, [trace], caption=caption, marks=marks, level=level, axis=axis)
    ]


def _memory(record: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    steps, largest = record.scalars("perf/peak_memory_gb")
    if not any(largest):
        return []
    traces = [line("largest", steps, largest, color=0)]
    parts = [row["perf/peak_memory_gb"] for row in record.rows if "perf/peak_memory_gb" in row]
    if any(isinstance(part, list) and len(part) > 1 for part in parts):
        smallest = [min(p) if isinstance(p, list) and p and None not in p else None for p in parts]
        traces.append(line("smallest", steps, smallest, color=1, dash="dot"))
    caption = "perf/peak_memory_gb: the peak of a process so far, in GiB"
    return [step_chart("memory", "Memory", traces, caption=caption, marks=marks, axis=FROM_ZERO)]


def _skips(record: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    keys = [k for k in ("train/skipped_steps", "train/spikes") if any(record.scalars(k)[1])]
    if not keys:
        return []
    names = {"train/skipped_steps": "skipped", "train/spikes": "outliers"}
    traces = [line(names[key], *record.scalars(key), color=i) for i, key in enumerate(keys)]
    caption = "Steps that were not finite and skipped, and outliers, counted from the start."
    return [step_chart("skips", "Skipped steps and outliers", traces, caption=caption, marks=marks)]
