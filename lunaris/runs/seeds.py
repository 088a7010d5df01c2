"""The points of a sweep that differ in nothing but their seed, joined. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

SEED = "seed"


class SeedGroup(NamedTuple):
    """The points that differ in nothing but their seed; `losses` are theirs."""

    values: dict[str, str]
    losses: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the losses; None of fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


def compared(points: Sequence[tuple[str, int]]) -> list[bool]:
    """Return which points have losses to compare: not one that paused before others went on.

    points: the state and the step of each.
    """
    furthest = max((step for _, step in points), default=0)
    return [state != "paused" or step == furthest for state, step in points]


def by_seed(points: Iterable[tuple[Mapping[str, str], float | None]]) -> list[SeedGroup]:
    """Return the points that have a finite loss, joined over their seeds, the lowest mean first.

    Empty where most of them stand alone: of a search at random, say, which repeats a point by
    accident. points: the swept values of each, as text by key, and its loss.
    """
    found: dict[tuple[tuple[str, str], ...], SeedGroup] = {}
    for swept, loss in points:
        values = {key: value for key, value in swept.items() if key != SEED}
        group = found.setdefault(tuple(values.items()), SeedGroup(values, []))
        if loss is not None and isfinite(loss):
            group.losses.append(loss)
    groups = [group for group in found.values() if group.losses]
    repeated = sum(len(group.losses) > 1 for group in groups)
    return sorted(groups, key=lambda group: group.mean) if 2 * repeated >= len(groups) else []
