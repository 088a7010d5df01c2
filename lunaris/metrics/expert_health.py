"""The use of experts: what a row says of it, and when it is unhealthy, in words.

A load is shown relative to the fair share: 1 is balanced, 0 an expert without a token.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lunaris.metrics.records import Row

# An expert below this part of the fair share is dead; over so many rows in a row it counts.
DEAD = 0.01
DEAD_ROWS = 3
# An expert above this many fair shares in the last rows is overloaded.
OVERLOADED = 4.0
# A capacity that drops more than this share of a layer's assignments is too small.
DROPPED = 0.1
_LAYER = re.compile(r"moe/layer_(\d+)/(\w+)")


@dataclass(frozen=True)
class LayerRouting:
    """What one step measured in one layer.

    load: [E] tokens sent to each expert. dropped: assignments. confidence: the mean over tokens of
    the largest gate; NaN where there is none. numbers: what the router itself reports, by name.
    """

    layer: int
    load: list[float]
    dropped: float
    confidence: float
    numbers: dict[str, float]


def expert_row(layers: Iterable[LayerRouting]) -> Row:
    """Return the `moe/` metrics of one step: of each layer, and the extremes over all of them."""
    row: Row = {}
    busiest, idlest = [], []
    for layer in layers:
        total, count = sum(layer.load), len(layer.load)
        if not total > 0:
            continue
        shares = [tokens / total for tokens in layer.load]
        found: Row = {
            "load": shares,
            "max_over_mean": max(shares) * count,
            "entropy": entropy(shares),
            "drop_rate": layer.dropped / total,
        }
        if not math.isnan(layer.confidence):
            found["confidence"] = layer.confidence
        for name, value in (found | layer.numbers).items():
            row[f"moe/layer_{layer.layer:02d}/{name}"] = value
        busiest.append(max(shares) * count)
        idlest.append(min(shares) * count)
    if busiest:
        row |= {"moe/max_load": max(busiest), "moe/min_load": min(idlest)}
    return row


def entropy(shares: list[float]) -> float:
    """Return the entropy of shares that sum to 1, relative to that of equal shares: 0 to 1."""
    if len(shares) == 1:
        return 1.0
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def layer_of(key: str) -> tuple[int, str] | None:
    """Return the layer and the name of a key `moe/layer_NN/NAME`; None for another key."""
    match = _LAYER.fullmatch(key)
    return None if match is None else (int(match[1]), match[2])


def loads(row: Row) -> dict[int, list[float]]:
    """Return the load of each expert in each layer of a row, relative to the fair share."""
    found = {}
    for key, value in row.items():
        layer = layer_of(key)
        if layer and layer[1] == "load" and isinstance(value, list) and _are_numbers(value):
            found[layer[0]] = [share * len(value) for share in value]
    return found


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong with the experts. kind: `dead`, `overloaded` or `dropped`.

    layers: those that it concerns. remedy: what to do about it, with the key to change.
    """

    kind: str
    layers: tuple[int, ...]
    text: str
    remedy: str


def expert_alarms(rows: list[Row], balancing: str | None) -> list[Alarm]:
    """Return what is wrong with the experts in the last DEAD_ROWS rows that have loads.

    Fewer rows show no dead and no overloaded expert, since a single step may pass one over.
    balancing: `moe.balancing`, or None for a router that has no such key.
    """
    found = [load for load in map(loads, rows) if load][-DEAD_ROWS:]
    alarms = []
    if len(found) == DEAD_ROWS:
        remedy = {
            "aux_loss": "Raise moe.aux_loss_weight, or take moe.balancing=bias.",
            "bias": "Raise moe.bias_update_rate.",
        }.get(str(balancing), "Take moe.balancing=bias or moe.balancing=aux_loss.")
        alarms += [*_dead(found, remedy), *_overloaded(found, remedy)]
    return alarms + _drops(rows)


class AlarmBell:
    """Tells what is wrong with the experts as rows come, each kind of alarm once for a layer."""

    def __init__(self, balancing: str | None) -> None:
        """balancing: as of `expert_alarms`."""
        self._balancing = balancing
        self._rows: deque[Row] = deque(maxlen=DEAD_ROWS)
        self._told: set[tuple[str, int]] = set()

    def take(self, row: Row) -> list[str]:
        """Return a line for each alarm that a row raises in a layer that had none of its kind."""
        if not loads(row):
            return []
        self._rows.append(row)
        lines = []
        for alarm in expert_alarms(list(self._rows), self._balancing):
            layers = {(alarm.kind, layer) for layer in alarm.layers}
            if not layers <= self._told:
                lines.append(f"step {row['step']}: {alarm.text} {alarm.remedy}")
            self._told |= layers
        return lines


def _dead(found: list[dict[int, list[float]]], remedy: str) -> list[Alarm]:
    dead = [
        (layer, expert)
        for layer, load in sorted(found[-1].items())
        for expert in range(len(load))
        if all(expert < len(f.get(layer, ())) and f[layer][expert] < DEAD for f in found)
    ]
    if not dead:
        return []
    shown = "; ".join(
        f"layer {layer}: {', '.join(str(expert) for _, expert in group)}"
        for layer, group in groupby(dead[:24], key=lambda pair: pair[0])
    )
    more = f" and {len(dead) - 24} more" if len(dead) > 24 else ""
    text = (
        f"{len(dead)} expert{'s' * (len(dead) != 1)} got under 1 % of the fair share in each of "
        f"the last {DEAD_ROWS} rows ({shown}{more})."
    )
    return [Alarm("dead", tuple(sorted({layer for layer, _ in dead})), text, remedy)]


def _overloaded(found: list[dict[int, list[float]]], remedy: str) -> list[Alarm]:
    # The busiest expert of each layer, in the row where it is least busy.
    busy = {layer: min(max(f[layer]) for f in found if layer in f) for layer in sorted(found[-1])}
    over = {layer: load for layer, load in busy.items() if load > OVERLOADED}
    if not over:
        return []
    shown = ", ".join(f"layer {layer}: {load:.1f} times" for layer, load in over.items())
    text = f"One expert gets far more than its fair share ({shown})."
    return [Alarm("overloaded", tuple(over), text, remedy)]


def _drops(rows: list[Row]) -> list[Alarm]:
    rates: dict[int, float] = {}
    for row in rows:
        for key, value in row.items():
            layer = layer_of(key)
            if layer and layer[1] == "drop_rate" and isinstance(value, int | float):
                rates[layer[0]] = value
    over = {layer: rate for layer, rate in sorted(rates.items()) if rate > DROPPED}
    if not over:
        return []
    worst = max(over, key=lambda layer: over[layer])
    text = f"The capacity drops up to {over[worst]:.0%} of a layer's assignments (layer {worst})."
    return [Alarm("dropped", tuple(over), text, "Raise moe.capacity_factor; null drops none.")]


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(v, int | float) and v == v for v in values)
