"""Heat maps of the experts: load by layer, expert and step, and each layer's own numbers.

A load is shown relative to the fair share: 1 is balanced, 0 an expert without a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lunaris.metrics.expert_health import layer_of, loads
from lunaris.metrics.records import Row
from lunaris.report.curves import FROM_ZERO, Mark, line, step_chart
from lunaris.report.page import Chart, View
from lunaris.report.record import RunRecord

# Of one chart: steps over time at most, and numbers in all of its views.
_MOST_STEPS = 120
_MOST_CELLS = 300_000
_MOST_MOMENTS = 8
# What the page's script turns into colours, by theme: 0 is red, 1 neutral, 2 and more blue.
_BALANCE = {"colorscale": "balance", "zmin": 0, "zmax": 2}

_TITLES = {
    "entropy": (
        "Entropy of the loads",
        "Relative to equal loads: 1 is balanced, 0 is one expert with every token.",
    ),
    "drop_rate": ("Dropped assignments", "Share of a layer's assignments beyond the capacity."),
    "confidence": ("Confidence of the router", "Mean over tokens of a token's largest gate."),
    "bias_range": ("Range of the balance bias", "Largest minus smallest bias of a layer."),
    "churn": (
        "Churn of the routing",
        "Share of the choices of the same validation tokens that changed since the evaluation "
        "before.",
    ),
}
# Numbers that another chart of the page shows.
_SHOWN_ELSEWHERE = ("load", "max_over_mean")


def expert_charts(record: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    """Return the charts of a run with experts; none for a dense run."""
    layers = sorted({layer for row in record.rows for layer in loads(row)})
    charts = []
    if layers:
        rows = [row for row in record.rows if loads(row)]
        charts += [_by_layer(rows, layers), _over_time(rows, layers), _busiest(rows, layers)]
    return charts + _layer_numbers(record) + _extremes(record, marks)


def _by_layer(rows: list[Row], layers: list[int]) -> Chart:
    views = []
    for row in reversed(_evenly(rows, _MOST_MOMENTS)):
        found = loads(row)
        z = [[_short(x) for x in found.get(layer, [])] for layer in layers]
        trace = _heat_map(z, y=[f"layer {layer}" for layer in layers])
        trace["hovertemplate"] = "%{y}, expert %{x}: %{z:.2f} of the fair share<extra></extra>"
        views.append(View(f"step {row['step']}", [trace | _BALANCE]))
    return Chart(
        "experts-layers",
        "Load of each expert, by layer",
        views,
        _axes("expert", "", categories=True),
        "Share of a layer's tokens, relative to the fair share: 1 is balanced, 0 is dead, "
        "2 and more is overloaded.",
        height=_height(len(layers)),
    )


def _over_time(rows: list[Row], layers: list[int]) -> Chart:
    n_experts = max(len(load) for row in rows[-1:] for load in loads(row).values())
    most = max(8, min(_MOST_STEPS, _MOST_CELLS // max(1, n_experts * len(layers))))
    chosen = _evenly(rows, most)
    found = [loads(row) for row in chosen]
    views = []
    for layer in layers:
        columns = [[_short(x) for x in load.get(layer, [])] for load in found]
        n = max(len(column) for column in columns)
        z = [[c[i] if i < len(c) else None for c in columns] for i in range(n)]
        trace = _heat_map(z, x=[row["step"] for row in chosen]) | _BALANCE
        trace["hovertemplate"] = "step %{x}, expert %{y}: %{z:.2f} of the fair share<extra></extra>"
        views.append(View(f"layer {layer}", [trace]))
    return Chart(
        "experts-time",
        "Load of each expert, over the steps",
        views,
        _axes("step", "expert"),
        f"{len(chosen)} of {len(rows)} rows of metrics.jsonl; a row shows one step.",
        height=_height(n_experts),
    )


def _busiest(rows: list[Row], layers: list[int]) -> Chart:
    chosen = _evenly(rows, _MOST_STEPS)
    found = [loads(row) for row in chosen]
    views = []
    for label, extreme in (("busiest expert", max), ("idlest expert", min)):
        z = [[_short(extreme(f[y])) if f.get(y) else None for f in found] for y in layers]
        trace = _heat_map(z, x=[row["step"] for row in chosen], y=[f"layer {y}" for y in layers])
        trace["hovertemplate"] = f"{label} of %{{y}} at step %{{x}}: %{{z:.2f}}<extra></extra>"
        # The busiest expert of a layer with a balanced load is a little above 1.
        scale = _BALANCE if extreme is min else _BALANCE | {"zmax": 4, "colorscale": "overload"}
        views.append(View(label, [trace | scale]))
    return Chart(
        "experts-extremes",
        "Busiest and idlest expert of each layer",
        views,
        _axes("step", "", categories=True),
        "The extremes of each layer, relative to the fair share.",
        height=_height(len(layers)),
    )


def _layer_numbers(record: RunRecord) -> list[Chart]:
    """Return a heat map, layer by step, for each number that is logged for every layer."""
    found: dict[str, dict[int, str]] = {}
    for key in dict.fromkeys(key for row in record.rows for key in row):
        layer = layer_of(key)
        if layer and layer[1] not in _SHOWN_ELSEWHERE and any(record.scalars(key)[1]):
            found.setdefault(layer[1], {})[layer[0]] = key
    charts = []
    for name, keys in found.items():
        rows = [row for row in record.rows if keys.values() & row.keys()]
        title, caption = _TITLES.get(name, (f"{name} of each layer", f"moe/layer_NN/{name}"))
        charts.append(_layers_over_time(f"layers-{name}", title, caption, rows, keys))
    return charts


def _layers_over_time(
    id: str, title: str, caption: str, rows: list[Row], keys: dict[int, str]
) -> Chart:
    layers = sorted(keys)
    chosen = _evenly(rows, _MOST_STEPS)
    z = [[_as_number(row.get(keys[y])) for row in chosen] for y in layers]
    trace = _heat_map(z, x=[row["step"] for row in chosen], y=[f"layer {y}" for y in layers])
    trace |= {"colorscale": "amount", "hovertemplate": "%{y}, step %{x}: %{z:.3g}<extra></extra>"}
    layout = _axes("step", "", categories=True)
    return Chart(id, title, [View("", [trace])], layout, caption, height=_height(len(layers)))


def _extremes(record: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    """Return the lines of the largest and smallest load over all layers."""
    traces = [
        line(name, *record.scalars(key), color=number)
        for number, (key, name) in enumerate(
            (("moe/max_load", "busiest expert"), ("moe/min_load", "idlest expert"))
        )
        if record.last(key) is not None
    ]
    if not traces:
        return []
    caption = "moe/max_load and moe/min_load over all layers, relative to the fair share"
    return [
        step_chart(
            "experts-lines", "Extremes over all layers", traces, caption=caption, marks=marks,
            axis=FROM_ZERO,
        )
    ]  # fmt: skip


def _heat_map(z: list[list[float | None]], **axes: list[Any]) -> dict[str, Any]:
    bar = {"thickness": 10, "outlinewidth": 0}
    return {"type": "heatmap", "z": z, "colorbar": bar, **axes}


def _axes(x: str, y: str, *, categories: bool = False) -> dict[str, Any]:
    vertical = {"title": {"text": y}, "automargin": True, "autorange": "reversed"}
    if categories:
        vertical["type"] = "category"
    return {"xaxis": {"title": {"text": x}, "showgrid": False}, "yaxis": vertical}


def _height(lines: int) -> int:
    return max(240, min(640, 110 + 16 * lines))


def _evenly(rows: list[Row], most: int) -> list[Row]:
    """Return at most `most` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _short(value: float) -> float | None:
    return round(value, 3)


def _as_number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < float("inf") else None
