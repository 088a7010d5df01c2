"""The page of a sweep: its points in a table, their curves, and what each swept key did."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from lunaris.config.run_names import values_of
from lunaris.report.curves import Trace, line, step_chart
from lunaris.report.page import (
    Block,
    Cell,
    Chart,
    Code,
    Facts,
    Note,
    Notes,
    Page,
    Section,
    Table,
    View,
)
from lunaris.report.record import RunRecord
from lunaris.runs.seeds import SEED, SeedGroup, by_seed, compared
from lunaris.runs.sweep_manifest import Manifest

# Points of a curve, so that hundreds of curves stay quick to draw.
_MOST_POINTS = 150
# Values of a key that differ by this factor are drawn on a logarithmic axis.
_WIDE = 20
# Values of a key up to which each has its mean and its tick, also where it has one point.
_FEW = 12
# Failures that are written out.
_MOST_FAILURES = 50


class Point(NamedTuple):
    """A point of a sweep. values: of its swept keys, as text. loss: the best of its validations,
    in nats a token, or None before the first one."""

    record: RunRecord
    values: dict[str, str]
    loss: float | None


def sweep_page(folder: Path, manifest: Manifest, records: Sequence[RunRecord]) -> Page:
    """Return the page of the sweep in `folder`. records: of its points, in their order."""
    points = [Point(r, values_of(r.overrides), r.val_loss()) for r in records]
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    points.sort(key=lambda point: float("inf") if point.loss is None else point.loss)
    states = (point.record.state for point in points)
    counted = compared([(each.state, each.status.get("step", 0)) for each in states])
    of_seeds = [(p.values, p.loss) for p, counts in zip(points, counted, strict=True) if counts]
    groups = by_seed(of_seeds) if SEED in keys else []
    counts = Counter(point.record.state.state for point in points)
    sections = [Section("summary", "Summary", _summary(folder, manifest, points, counts))]
    sections.append(Section("points", "Points", [_table(folder, points, keys)], _SORTED))
    if groups:
        intro = "The mean over the seeds, and their standard deviation."
        sections.append(Section("seeds", "Seeds", [_seed_table(groups)], intro))
    curves = _curves(points)
    if curves:
        sections.append(Section("curves", "Curves", curves))
    effects = _effects(points, [key for key in keys if key != SEED])
    if effects:
        sections.append(Section("keys", "Swept keys", effects))
    return Page(manifest.name, str(folder), sections, _badge(counts))


_SORTED = "The best validation loss first; a click on a title sorts by its column."


def _badge(counts: Counter[str]) -> str:
    return next(iter(counts)) if len(counts) == 1 else ""


def _summary(
    folder: Path, manifest: Manifest, points: Sequence[Point], counts: Counter[str]
) -> list[Block]:
    states = ", ".join(f"{number} {state}" for state, number in counts.most_common())
    best = points[0] if points and points[0].loss is not None else None
    pairs = [("points", states)]
    blocks: list[Block] = []
    if best is not None:
        pairs.insert(0, ("best point", best.record.name))
        pairs.insert(1, ("its validation loss", f"{best.loss:.4f}"))
    blocks.append(Facts(pairs))
    if best is not None:
        given = {row.name: row.overrides for row in manifest.points}.get(best.record.name, [])
        # A run of its own, with a name of its own, and not the point's folder.
        own = [text for text in given if text.partition("=")[0] not in ("name", "out_dir")]
        blocks.append(Code(shlex.join(["lunaris", "train", *own]), command=True))
    blocks.append(Code(manifest.command, summary="the command of the sweep"))
    failures = [p for p in points if p.record.state.state in ("failed", "missing")]
    notes = [
        Note("bad", f"{p.record.name}: {p.record.error() or p.record.state.state}")
        for p in failures[:_MOST_FAILURES]
    ]
    if len(failures) > _MOST_FAILURES:
        notes.append(Note("bad", f"{len(failures) - _MOST_FAILURES} more points failed."))
    damaged = [p for p in points if p.record.damaged or p.record.config_fault]
    notes += [
        Note("warn", f"{p.record.name}: {_damage(p.record)}") for p in damaged
        if not p.record.missing
    ]  # fmt: skip
    return [*blocks, Notes(notes)] if notes else blocks


def _damage(record: RunRecord) -> str:
    lines = ", ".join(map(str, record.damaged[:5]))
    parts = [f"metrics.jsonl has lines that cannot be read: {lines}"] if record.damaged else []
    return "; ".join([*parts, *([record.config_fault] if record.config_fault else [])])


def _table(folder: Path, points: Sequence[Point], keys: Sequence[str]) -> Table:
    shown = _short(keys)
    head = ["rank", *(shown[key] for key in keys), "state", "step", "best val loss"]
    rows = []
    for rank, point in enumerate(points, 1):
        status = point.record.state.status
        rows.append([
            Cell(str(rank), rank),
            *(Cell(point.values.get(key, "–"), number(point.values.get(key))) for key in keys),
            Cell(point.record.state.state),
            Cell(f"{status.get('step', 0):,}", status.get("step", 0)),
            *(_loss(v) for v in (point.loss, point.record.last("val/loss"),
                                 point.record.last("train/main_loss"))),
            _loss(point.record.last("perf/tokens_per_s"), ",.0f"),
            Cell(point.record.name),
        ])  # fmt: skip
    head += ["last val loss", "last train loss", "tokens/s", "point"]
    links = {
        i: f"{point.record.path.name}/report.html" for i, point in enumerate(points)
        if (folder / point.record.path.name / "report.html").is_file()
    }  # fmt: skip
    return Table(head, rows, sortable=True, links=links)


def _seed_table(groups: Sequence[SeedGroup]) -> Table:
    keys = list(dict.fromkeys(key for group in groups for key in group.values))
    shown = _short(keys)
    rows = [
        [
            *(Cell(group.values.get(key, "–"), number(group.values.get(key))) for key in keys),
            Cell(str(len(group.losses)), len(group.losses)),
            _loss(group.mean),
            _loss(group.spread),
        ]
        for group in groups
    ]
    return Table([*(shown[key] for key in keys), "seeds", "mean", "spread"], rows, sortable=True)


def _loss(value: float | None, form: str = ".4f") -> Cell:
    return Cell("–") if value is None else Cell(format(value, form), value)


def _curves(points: Sequence[Point]) -> list[Chart]:
    charts = []
    for key, title in (("val/loss", "Validation loss"), ("train/main_loss", "Training loss")):
        drawn = [p for p in points if any(v is not None for v in p.record.scalars(key)[1])]
        traces = [_curve(point, key, i, len(drawn)) for i, point in enumerate(drawn)]
        if traces:
            # The best one is drawn last, over the others.
            chart = step_chart(
                f"curves-{key.replace('/', '-')}", title, traces[::-1],
                caption=f"{key}, nats a token; the best point is the thick line.",
            )  # fmt: skip
            charts.append(chart)
    return charts


def _curve(point: Point, key: str, place: int, count: int) -> Trace:
    """Return the curve of a point. place: 0 is the best; few curves get a colour each."""
    color = place if count <= 8 else place / count + 1e-6
    steps, values = point.record.scalars(key)
    trace = line(point.record.name, steps, values, color=color, most=_MOST_POINTS)
    trace["line"] = {"width": 3.5 if place == 0 else 1.25}
    return trace


def _effects(points: Sequence[Point], keys: Sequence[str]) -> list[Chart]:
    """Return a chart of the loss over each swept key, and one over all of them."""
    measured = [point for point in points if point.loss is not None]
    shown = _short(keys)
    charts = []
    for i, key in enumerate(keys):
        there = [point for point in measured if key in point.values]
        if len({point.values[key] for point in there}) > 1:
            charts.append(_effect(f"key-{i}", shown[key], key, there))
    if len(charts) > 1:
        charts.append(_parallel(measured, keys))
    return charts


def _effect(chart: str, title: str, key: str, points: Sequence[Point]) -> Chart:
    values = {point.values[key] for point in points}
    numbers = {value: number(value) for value in values}
    numeric = all(n is not None for n in numbers.values())
    order = sorted(values, key=lambda v: (numbers[v] if numeric else 0, v))
    place: dict[str, Any] = {value: numbers[value] if numeric else value for value in values}
    means = {
        v: mean([p.loss for p in points if p.values[key] == v and p.loss is not None])
        for v in order
    }
    traces: list[Trace] = [
        {
            "type": "scatter", "mode": "markers", "name": "point", "color": 0,
            "x": [place[p.values[key]] for p in points], "y": [p.loss for p in points],
            "text": [p.record.name for p in points], "marker": {"size": 7, "opacity": 0.6},
        },
    ]  # fmt: skip
    caption = f"best val/loss of each point over {key}"
    # Of values drawn at random, which hardly repeat, a line through the means would show noise.
    if len(values) <= max(_FEW, len(points) // 2):
        caption += ", and the mean at each value"
        traces.append({
            "type": "scatter", "mode": "lines", "name": "mean", "color": 1,
            "x": [place[v] for v in order], "y": [means[v] for v in order],
        })  # fmt: skip
    axis: dict[str, Any] = {"title": {"text": key}, "exponentformat": "e"}
    found = [n for n in numbers.values() if n is not None]
    if not numeric:
        axis |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    elif min(found) > 0 and max(found) / min(found) >= _WIDE:
        axis["type"] = "log"
    layout = {"xaxis": axis, "yaxis": {"automargin": True}, "showlegend": False}
    return Chart(chart, title, [View("", traces)], layout, caption)


def _parallel(points: Sequence[Point], keys: Sequence[str]) -> Chart:
    """Return parallel coordinates; each key's values stand at equal distances, in their order."""
    dimensions = []
    shown = _short(keys)
    for key in keys:
        given = {point.values.get(key, "–") for point in points}
        numbers = {value: number(value) for value in given}
        order = sorted(given, key=lambda v: (numbers[v] is None, numbers[v] or 0, v))
        ticks = _ticks(len(order))
        dimensions.append({
            "label": shown[key], "tickvals": ticks, "ticktext": [order[i] for i in ticks],
            "values": [order.index(point.values.get(key, "–")) for point in points],
            "range": [0, max(1, len(order) - 1)],
        })  # fmt: skip
    losses = [point.loss for point in points]
    dimensions.append({"label": "val loss", "values": losses})
    trace = {
        "type": "parcoords", "dimensions": dimensions,
        "line": {"color": losses, "colorscale": "scale", "showscale": True},
    }  # fmt: skip
    layout = {"margin": {"l": 60, "r": 30, "t": 50, "b": 20}}
    caption = "A line is a point; drag along an axis to keep a part of the points."
    title = "All swept keys"
    return Chart("parallel", title, [View("", [trace])], layout, caption, wide=True, height=380)


def _ticks(count: int) -> list[int]:
    """Return the places of at most `_FEW` of `count` values, the first and the last among them."""
    number = min(count, _FEW)
    return [round(i * (count - 1) / max(1, number - 1)) for i in range(number)]


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key as its title, and the key where two have the same."""
    counts = Counter(key.rpartition(".")[2] for key in keys)
    return {k: last if counts[last := k.rpartition(".")[2]] == 1 else k for k in keys}


def number(text: str | None) -> float | None:
    """Return the number that a value is written as, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
