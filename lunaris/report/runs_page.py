"""The page of several runs: a table, what differs in their configs, curves over each other."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from statistics import median
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from lunaris.report.curves import line, step_chart
from lunaris.report.findings import findings
from lunaris.report.page import (
    Block,
    Cell,
    Chart,
    Code,
    Note,
    Notes,
    Page,
    Section,
    Table,
    View,
)
from lunaris.report.record import RunRecord
from lunaris.report.run_page import FOLDER_KEYS, shown
from lunaris.runs.run_dir import RunDir

# Lines that a reader can tell apart by colour; of more, the colour says the place in the order.
_MOST_COLORS = 8
_ABSENT = "–"
_CHARTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("train/main_loss", "Training loss", "train/main_loss, nats a token: the mean since the row "
     "before", {}),
    ("val/loss", "Validation loss", "val/loss, nats a token", {}),
    ("train/lr", "Learning rate", "train/lr", {}),
    ("train/grad_norm", "Gradient norm", "train/grad_norm: before clipping",
     {"rangemode": "tozero"}),
    ("perf/tokens_per_s", "Throughput", "perf/tokens_per_s: tokens a second of all processes, "
     "without evaluating and saving", {"rangemode": "tozero"}),
)  # fmt: skip


# Longer names, such as those made of overrides, do not fit legends and the heads of tables.
_LONGEST_NAME = 28


class Named(NamedTuple):
    """A run under the name that tells it from the other ones of the page.

    label: the name, or where a name is too long a letter, which the first table explains.
    """

    label: str
    name: str
    record: RunRecord


def runs_page(records: Sequence[RunRecord]) -> Page:
    """Return the page that compares two or more runs, in the order in which they are given."""
    runs = _named(records)
    charts = _charts(runs)
    sections = [Section("summary", "Summary", [_table(runs), Notes(_notes(runs))], _SORTED)]
    sections.append(Section("config", "What differs in their configs", [_differences(runs)]))
    if charts:
        sections.append(Section("curves", "Curves", charts, _AXES))
    sections.append(Section("commands", "Commands", _commands(runs), _REPRODUCED))
    return Page(f"{len(runs)} runs", ", ".join(str(r.path) for r in records), sections)


def _named(records: Sequence[RunRecord]) -> list[Named]:
    counts = Counter(record.name for record in records)
    names = [r.name if counts[r.name] == 1 else str(r.path) for r in records]
    labels = names
    if any(len(name) > _LONGEST_NAME for name in names):
        letters = ascii_uppercase if len(names) <= len(ascii_uppercase) else ()
        labels = list(letters[: len(names)]) or [str(i) for i in range(1, len(names) + 1)]
    return list(map(Named, labels, names, records))


_SORTED = "A row is a run, in the order given; a click on a title sorts by its column."
_AXES = "A run has one colour in all charts; each chart is over the steps or the tokens read."
_REPRODUCED = (
    "What starts each run again from nothing, in another folder or with another name=; the "
    "changes of a run follow in their order."
)


def _table(runs: Sequence[Named]) -> Table:
    head = [
        "run", "state", "best val loss", "last val loss", "last train loss", "step", "tokens",
        "time", "tokens/s", "parameters", "active", "skipped", "restarts",
    ]  # fmt: skip
    lettered = any(run.label != run.name for run in runs)
    rows = [[Cell(run.label)] * lettered + _row(run) for run in runs]
    return Table([""] * lettered + head, rows, sortable=True)


def _row(run: Named) -> list[Cell]:
    record, status = run.record, run.record.state.status
    speeds = [s for s in record.scalars("perf/tokens_per_s")[1] if s is not None]
    seconds = RunDir(record.path).trained_s(active=record.state.active)
    time = str(timedelta(seconds=round(seconds))) if seconds is not None else "–"
    return [
        Cell(run.name),
        Cell(record.state.state),
        _number(record.val_loss(), ".4f"),
        _number(record.last("val/loss"), ".4f"),
        _number(record.last("train/main_loss"), ".4f"),
        _number(status.get("step", 0)),
        _number(_tokens(record)),
        Cell(time, seconds),
        _number(median(speeds) if speeds else None),
        _number(status.get("parameters")),
        _number(status.get("active_parameters")),
        _number(record.last("train/skipped_steps")),
        _number(max(0, status.get("attempts", 0) - 1)),
    ]


def _number(value: float | None, form: str = ",.0f") -> Cell:
    return Cell("–") if value is None else Cell(format(value, form), value)


def _tokens(record: RunRecord) -> float | None:
    """Return the tokens read, as status.json says, else by the sequences of the last row."""
    written = record.state.status.get("tokens")
    if written is not None:
        return float(written)
    sequences, length = record.last("train/sequences"), record.config.get("model.max_seq_len")
    return sequences * length if sequences and isinstance(length, int) else None


def _notes(runs: Sequence[Named]) -> list[Note]:
    """Return what limits the comparison, then each run's warnings under its name."""
    notes = []
    digests = [run.record.provenance.get("data") for run in runs]
    known = [found for found in digests if found]
    if any(found != known[0] for found in known):
        text = (
            "The runs read different training data; their losses compare only where the "
            "validation data and the tokenizer are the same."
        )
        notes.append(Note("warn", text))
    for run in runs:
        for note in findings(run.record):
            if note.level in ("bad", "warn"):
                notes.append(Note(note.level, f"{run.label}: {note.text}", note.remedy))
    notes.sort(key=lambda note: note.level)
    return notes or [Note("good", "Nothing stands out in these runs' numbers.")]


def _differences(runs: Sequence[Named]) -> Block:
    """Return the keys whose values are not the same in all runs whose config can be read.

    A key that only some of the chosen components have is left out where those agree on it: the
    component's own row says that they differ.
    """
    read = [run for run in runs if run.record.config]
    keys = dict.fromkeys(key for run in read for key in run.record.config)
    chosen = {
        key.removesuffix("_target_")
        for key in keys
        if key.endswith("._target_") and len({run.record.config.get(key) for run in read}) > 1
    }
    rows = []
    for key in keys:
        values = [shown(run.record.config.get(key, _ABSENT)) for run in read]
        compared = set(values)
        if any(key.startswith(group) and key != f"{group}_target_" for group in chosen):
            compared -= {_ABSENT}
        if key not in FOLDER_KEYS and len(compared) > 1:
            rows.append([Cell(key), *(Cell(value) for value in values)])
    if not rows:
        return Notes([Note("info", "No key differs.")])
    return Table(["key", *(run.label for run in read)], rows)


def _commands(runs: Sequence[Named]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        lines = [_command(run.record), *(change.command for change in run.record.changes)]
        blocks.append(
            Code("\n".join(line for line in lines if line), label=run.label, command=True)
        )
    return blocks


def _command(record: RunRecord) -> str:
    """Return the command that trains the run from its beginning.

    A run that a sweep, Python or `lunaris resume` started has no such command line; its overrides
    make it.
    """
    command = str(record.provenance.get("command", ""))
    words = command.split()
    if words[:2] == ["lunaris", "fork"]:
        return command
    if words[:2] == ["lunaris", "train"] and not {"-m", "--multirun"} & {*words}:
        return command
    given = record.provenance.get("overrides") or []
    # A run of its own, with a name of its own, and not the point's folder.
    own = [text for text in given if text.partition("=")[0] not in ("name", "out_dir")]
    return shlex.join(["lunaris", "train", *own])


def _charts(runs: Sequence[Named]) -> list[Chart]:
    charts = []
    for key, title, caption, axis in _CHARTS:
        chart = _chart(runs, key, title, caption, axis)
        if chart is not None:
            charts.append(chart)
    return charts


def _chart(
    runs: Sequence[Named], key: str, title: str, caption: str, axis: dict[str, Any]
) -> Chart | None:
    """Return a metric of all runs over the steps and over the tokens; None where none has it."""
    over_steps, over_tokens = [], []
    for place, run in enumerate(runs):
        steps, values = run.record.scalars(key)
        if all(value is None for value in values):
            continue
        color = place if len(runs) <= _MOST_COLORS else place / len(runs) + 1e-6
        markers = key == "val/loss"
        trace = line(run.label, steps, values, color=color, markers=markers)
        over_steps.append(trace)
        tokens = tokens_at(run.record, trace["x"])
        if tokens is not None:
            over_tokens.append(trace | {"x": tokens})
    if not over_steps:
        return None
    chart = step_chart(
        f"runs-{key.replace('/', '-')}", title, over_steps, caption=caption, axis=axis
    )
    chart.layout["showlegend"] = len(runs) <= _MOST_COLORS
    views = [View("steps", over_steps)]
    if over_tokens:
        views.append(View("tokens", over_tokens, x="tokens"))
    return Chart(chart.id, title, views, chart.layout, caption)


def tokens_at(record: RunRecord, steps: Sequence[int]) -> list[int] | None:
    """Return the tokens read up to each step; None where no row says them.

    Between two rows that have `train/sequences`, every step read equally many.
    """
    length = record.config.get("model.max_seq_len")
    known = [
        (step, value)
        for step, value in zip(*record.scalars("train/sequences"), strict=True)
        if value is not None
    ]
    if not known or not isinstance(length, int):
        return None
    at, sequences = zip(*([] if known[0][0] == 0 else [(0, 0.0)]), *known, strict=True)
    read = np.interp(steps, at, sequences)
    return [round(float(x) * length) for x in read]
