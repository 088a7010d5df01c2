"""Paired keys of a sweep: `--zip` runs the i-th values of several keys together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from lunaris.errors import UserError, did_you_mean

# `--zip` without names, which pairs all swept keys.
EVERY = ""


def combine(
    values: Mapping[str, Sequence[str]], swept: Sequence[str], zipped: Sequence[str]
) -> list[list[str]]:
    """Return the overrides of every point, each in the order of `values`.

    values: the overrides that each key may have. swept: the keys with a list of them. zipped: what
    each `--zip` of the command line names. Paired keys step together, and everything else is
    multiplied. Raises UserError for keys that cannot be paired.
    """
    groups = _groups(swept, zipped)
    paired = {key: group for group in groups for key in group}
    axes: list[list[tuple[tuple[str, str], ...]]] = []
    for key in values:
        group = paired.get(key, [key])
        # A group stands in the product where the first of its keys does.
        if key == next(name for name in values if name in group):
            columns = [[(name, text) for text in values[name]] for name in group]
            if len({len(column) for column in columns}) > 1:
                raise UserError(_uneven({name: len(values[name]) for name in group}))
            axes.append(list(zip(*columns, strict=True)))
    points = []
    for chosen in itertools.product(*axes):
        point = dict(pair for pairs in chosen for pair in pairs)
        points.append([point[key] for key in values])
    return points


def _groups(swept: Sequence[str], zipped: Sequence[str]) -> list[list[str]]:
    """Return the keys that each `--zip` pairs. Raises UserError for wrong ones."""
    if EVERY in zipped:
        if len(zipped) > 1:
            raise UserError(
                "--zip: without names it pairs all swept keys; give names to each --zip, or leave "
                "the others out"
            )
        if len(swept) < 2:
            raise UserError(f"--zip: pairs two or more swept keys (KEY=A,B,C); {_are(swept)}")
        return [list(swept)]
    groups = [[key.strip() for key in names.split(",")] for names in zipped]
    named = [key for group in groups for key in group]
    for names, group in zip(zipped, groups, strict=True):
        if len(group) < 2:
            raise UserError(f"--zip {names}: name two or more keys to pair: --zip KEY,KEY")
        for key in group:
            if key not in swept:
                raise UserError(
                    f"--zip {names}: {key or 'an empty name'} is not swept (KEY=A,B,C); "
                    f"{_are(swept)}{did_you_mean(key, swept)}"
                )
            if named.count(key) > 1:
                raise UserError(f"--zip {names}: {key} is named more than once")
    return groups


def _uneven(lengths: Mapping[str, int]) -> str:
    counts = ", ".join(f"{key} has {number}" for key, number in lengths.items())
    return (
        f"--zip: paired keys need the same number of values, but {counts}; --zip KEY,KEY pairs "
        "only the keys that it names"
    )


def _are(swept: Sequence[str]) -> str:
    return f"swept: {', '.join(swept)}" if swept else "no key is swept"
