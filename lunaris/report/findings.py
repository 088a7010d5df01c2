"""What a reader of a run's numbers should know, in words, with the key that mends it."""

from __future__ import annotations

from itertools import groupby
from statistics import median

from lunaris.report.experts import loads
from lunaris.report.page import Note
from lunaris.report.record import RunRecord

# An expert below this part of the fair share is dead; over so many rows in a row it counts.
DEAD = 0.01
DEAD_ROWS = 3
# An expert above this many fair shares in the last rows is overloaded.
OVERLOADED = 4.0
_DROPPED = 0.1
_WAITING = 0.1
# A validation loss this far above the best one has risen.
_RISEN = 0.02
_ENDED_BADLY = ("failed", "timeout", "node_fail", "out_of_memory", "preempted", "cancelled")
_ORDER = ("bad", "warn", "info", "good")


def findings(record: RunRecord) -> list[Note]:
    """Return the notes on a run, the worst first."""
    notes = [
        *_state(record),
        *_files(record),
        *_losses(record),
        *_steps(record),
        *_experts(record),
        *_speed(record),
    ]
    return sorted(notes, key=lambda note: _ORDER.index(note.level))


def _state(record: RunRecord) -> list[Note]:
    state, path = record.state.state, record.path
    status = record.state.status
    at = f"step {status.get('step', 0)} of {status.get('max_steps', '?')}"
    if state == "done":
        return []
    if state in _ENDED_BADLY or state == "missing":
        why = record.error()
        again = f"`lunaris resume {path}` continues from the newest checkpoint."
        return [Note("bad", f"The run is {state} at {at}" + (f": {why}" if why else "."), again)]
    if state == "stopped":
        return [
            Note("warn", f"The run was stopped at {at}.", f"`lunaris resume {path}` continues.")
        ]
    return [Note("info", f"The run is {state} at {at}; this page shows it as it was when written.")]


def _files(record: RunRecord) -> list[Note]:
    notes = []
    if record.damaged:
        lines = ", ".join(str(number) for number in record.damaged[:10])
        more = "" if len(record.damaged) <= 10 else f" and {len(record.damaged) - 10} more"
        notes.append(
            Note("warn", f"metrics.jsonl: line {lines}{more} cannot be read and is left out.")
        )
    if record.config_fault:
        notes.append(Note("warn", f"{record.config_fault}."))
    if not record.rows:
        notes.append(Note("info", "metrics.jsonl has no rows yet."))
    git = record.provenance.get("git") or {}
    if git.get("dirty"):
        notes.append(
            Note(
                "info",
                "The code had changes that were not committed when the run was started, so its "
                "commit alone does not reproduce it.",
            )
        )
    return notes


def _losses(record: RunRecord) -> list[Note]:
    notes = []
    best, last = record.best("val/loss"), record.last("val/loss")
    if record.rows and best is None:
        notes.append(
            Note(
                "info",
                "There is no validation loss.",
                "Set trainer.eval_interval, or prepare data with a validation part "
                "(data.val_fraction, data.val_dir).",
            )
        )
    if best is not None and last is not None and last > best[1] * (1 + _RISEN):
        notes.append(
            Note(
                "warn",
                f"The validation loss rose from {best[1]:.4f} at step {best[0]} to {last:.4f}.",
                "More data or model.dropout help against overfitting, a lower "
                "optimizer.learning_rate against divergence.",
            )
        )
    _, values = record.scalars("train/loss")
    gaps = sum(value is None for value in values)
    if gaps:
        notes.append(
            Note("warn", f"{gaps} of {len(values)} rows have a training loss that is not finite.")
        )
    return notes


def _steps(record: RunRecord) -> list[Note]:
    notes = []
    skipped = record.last("train/skipped_steps")
    if skipped:
        notes.append(
            Note(
                "warn",
                f"{skipped:.0f} steps were skipped, because a loss or a gradient was not finite "
                "or, with trainer.skip_spikes, an outlier.",
                "Lower optimizer.learning_rate; bf16 has a wider range than fp16.",
            )
        )
    spikes = record.last("train/spikes")
    if spikes:
        notes.append(
            Note(
                "info",
                f"{spikes:.0f} steps were outliers in their loss or gradient norm "
                "(trainer.spike_threshold).",
            )
        )
    return notes


def _experts(record: RunRecord) -> list[Note]:
    rows = [found for found in map(loads, record.rows) if found]
    if not rows:
        return []
    balancing = record.config.get("moe.balancing")
    remedy = {
        "aux_loss": "Raise moe.aux_loss_weight, or take moe.balancing=bias.",
        "bias": "Raise moe.bias_update_rate.",
    }.get(str(balancing), "Take moe.balancing=bias or moe.balancing=aux_loss.")
    notes = []
    dead = dead_experts(rows)
    if dead:
        shown = "; ".join(
            f"layer {layer}: {', '.join(str(expert) for _, expert in group)}"
            for layer, group in groupby(dead[:24], key=lambda pair: pair[0])
        )
        more = f" and {len(dead) - 24} more" if len(dead) > 24 else ""
        text = (
            f"{len(dead)} experts got under 1 % of the fair share in each of the last {DEAD_ROWS} "
            f"rows ({shown}{more})."
        )
        notes.append(Note("warn", text, remedy))
    last = rows[-DEAD_ROWS:]
    busy = {layer: min(max(found[layer]) for found in last if layer in found) for layer in rows[-1]}
    over = {layer: load for layer, load in busy.items() if load > OVERLOADED}
    if over:
        shown = ", ".join(f"layer {layer}: {load:.1f} times" for layer, load in over.items())
        notes.append(
            Note("warn", f"One expert gets far more than its fair share ({shown}).", remedy)
        )
    return notes + _drops(record)


def dead_experts(rows: list[dict[int, list[float]]]) -> list[tuple[int, int]]:
    """Return the (layer, expert) that are dead in each of the last rows of loads.

    Fewer rows than DEAD_ROWS show none, since a single step may pass over an expert.
    """
    last = rows[-DEAD_ROWS:]
    if len(last) < DEAD_ROWS:
        return []
    return [
        (layer, expert)
        for layer, load in sorted(last[-1].items())
        for expert in range(len(load))
        if all(expert < len(f.get(layer, ())) and f[layer][expert] < DEAD for f in last)
    ]


def _drops(record: RunRecord) -> list[Note]:
    keys = {key for row in record.rows for key in row if key.endswith("/drop_rate")}
    rates = {key: record.last(key) or 0.0 for key in keys}
    worst = max(rates.values(), default=0.0)
    if worst <= _DROPPED:
        return []
    layer = min(key for key, rate in rates.items() if rate == worst).split("/")[1]
    return [
        Note(
            "warn",
            f"The capacity drops up to {worst:.0%} of a layer's assignments ({layer}).",
            "Raise moe.capacity_factor; null drops none.",
        )
    ]


def _speed(record: RunRecord) -> list[Note]:
    waits = [value for value in record.scalars("perf/data_wait")[1][1:] if value is not None]
    if waits and median(waits) > _WAITING:
        text = f"Training waits for its data in {median(waits):.0%} of the time."
        return [
            Note("warn", text, "Check the disk behind data.dir; launch.cpus_per_task on SLURM.")
        ]
    return []
