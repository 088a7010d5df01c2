"""What a reader of a run's numbers should know, in words, with the key that mends it."""

from __future__ import annotations

from statistics import median

from lunaris.metrics.expert_health import expert_alarms
from lunaris.report.page import Note
from lunaris.report.record import RunRecord

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
    if state == "paused":
        again = f"`lunaris resume {path} trainer.stop_at=null` continues."
        return [Note("info", f"The run is paused at {at} (trainer.stop_at).", again)]
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
    balancing = record.config.get("moe.balancing")
    alarms = expert_alarms(record.rows, None if balancing is None else str(balancing))
    return [Note("warn", alarm.text, alarm.remedy) for alarm in alarms]


def _speed(record: RunRecord) -> list[Note]:
    waits = [value for value in record.scalars("perf/data_wait")[1][1:] if value is not None]
    if waits and median(waits) > _WAITING:
        text = f"Training waits for its data in {median(waits):.0%} of the time."
        return [
            Note("warn", text, "Check the disk behind data.dir; launch.cpus_per_task on SLURM.")
        ]
    return []
