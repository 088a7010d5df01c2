"""The page of one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from lunaris.report import curves, experts
from lunaris.report.findings import findings
from lunaris.report.page import Block, Cell, Code, Facts, Note, Notes, Page, Section, Table
from lunaris.report.record import RunRecord

FOLDER_KEYS = ("name", "out_dir", "config_version")


class Sample(NamedTuple):
    """A text that a run's checkpoint of `step` continues `prompt` with."""

    step: int
    prompt: str
    text: str


def run_page(record: RunRecord, defaults: dict[str, Any], samples: Sequence[Sample] = ()) -> Page:
    """Return the page of a run.

    defaults: what a command without overrides composes, flat. samples: shown in their order.
    """
    marks = marks_of(record)
    notes = findings(record) or [Note("good", "Nothing stands out in this run's numbers.")]
    training = curves.run_charts(record, marks)
    sections = [Section("summary", "Summary", [Facts(_facts(record)), Notes(notes)])]
    if training:
        sections.append(Section("training", "Training", training, _marks_in_words(marks)))
    health = experts.expert_charts(record, marks)
    if health:
        sections.append(Section("experts", "Experts", health))
    others = curves.other_charts(record, marks, curves.shown_keys(record))
    if others:
        sections.append(Section("others", "Other metrics", others))
    if samples:
        blocks = [
            Code(sample.prompt + sample.text, label=f"step {sample.step:,}") for sample in samples
        ]
        sections.append(Section("samples", "Samples", blocks, _SAMPLES))
    sections += [_history(record), _config(record, defaults), _provenance(record)]
    return Page(record.name, str(record.path), sections, record.state.state)


_SAMPLES = "The same prompts, continued by each of the run's checkpoints with the same seed."


def marks_of(record: RunRecord) -> list[curves.Mark]:
    """Return the vertical lines of a run: changes of its config (c1, …), restarts (r1, …)."""
    changes = [(change.step, f"c{i}") for i, change in enumerate(record.changes, 1)]
    restarts = [(step, f"r{i}") for i, step in enumerate(_restarts(record), 1) if step is not None]
    joined: dict[int, str] = {}
    for step, text in [*changes, *restarts]:
        joined[step] = f"{joined[step]} {text}" if step in joined else text
    return sorted(joined.items())


def provenance_pairs(record: RunRecord) -> list[tuple[str, str]]:
    """Return where a run comes from: command, commit, versions, machine."""
    found = record.provenance
    git = found.get("git") or {}
    commit = git.get("commit") or "not known"
    versions = found.get("versions") or {}
    slurm = found.get("slurm") or {}
    pairs = [
        ("command", str(found.get("command", ""))),
        ("in folder", str(found.get("cwd", ""))),
        ("created", _when(found.get("created"))),
        ("commit", f"{commit} (with changes that were not committed)" if git.get("dirty")
         else commit),
        ("host", str(found.get("host", ""))),
        ("platform", str(found.get("platform", ""))),
        ("python", str(found.get("python", ""))),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("SLURM job", str(slurm.get("SLURM_JOB_ID", ""))),
        *(("comes from", f"{parent.get('kind')} {parent.get('dir')}"
           + (f" at step {parent['step']}" if parent.get("step") else ""))
          for parent in found.get("parents") or []),
        *(("data", f"{name}: {digest}") for name, digest in (found.get("data") or {}).items()),
    ]  # fmt: skip
    return [(name, text) for name, text in pairs if text]


def shown_number(value: float | None, form: str = ".4f") -> str:
    """Return a number as text, and a dash where there is none."""
    return "–" if value is None else format(value, form)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    status = record.state.status
    best = record.best("val/loss")
    tokens = record.last("train/sequences")
    length = record.config.get("model.max_seq_len")
    speeds = [s for s in record.scalars("perf/tokens_per_s")[1] if s is not None]
    mfu = [m for m in record.scalars("perf/mfu")[1] if m is not None]
    memory = record.highest("perf/peak_memory_gb")
    pairs = [
        ("step", f"{status.get('step', 0):,} of {status.get('max_steps', '?')}"),
        ("best validation loss", f"{best[1]:.4f} at step {best[0]:,}" if best else "–"),
        ("last validation loss", shown_number(record.last("val/loss"))),
        ("last training loss", shown_number(record.last("train/main_loss"))),
        ("tokens", f"{tokens * length:,.0f}" if tokens and isinstance(length, int) else "–"),
        ("parameters", _count(status.get("parameters"))),
        ("active a token", _count(status.get("active_parameters"))),
        ("tokens a second, median", f"{median(speeds):,.0f}" if speeds else "–"),
        ("MFU, median", f"{median(mfu):.1%}" if mfu else ""),
        ("peak memory of a process", f"{memory:.2f} GiB" if memory is not None else "–"),
        ("starts", str(status.get("attempts", 0))),
        ("job", record.state.job_id or ""),
        ("last written", _when(status.get("time"))),
    ]
    return [(name, text) for name, text in pairs if text]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _restarts(record: RunRecord) -> list[int | None]:
    """Return the step of each start but the first; None where an older version recorded none."""
    attempts = record.provenance.get("attempts") or []
    steps = [attempt.get("step") for attempt in attempts[1:]]
    return [step if type(step) is int else None for step in steps]


def _marks_in_words(marks: list[curves.Mark]) -> str:
    if not marks:
        return ""
    return "Vertical lines: c1, c2, … changes of the config, r1, r2, … restarts; listed below."


def _history(record: RunRecord) -> Section:
    blocks: list[Block] = []
    if record.changes:
        rows = [
            [Cell(f"c{i}"), _step_cell(change.step), Cell(str(change)), Cell(change.command)]
            for i, change in enumerate(record.changes, 1)
        ]
        blocks.append(Table(["change", "after step", "what", "command"], rows))
    attempts = record.provenance.get("attempts") or []
    if attempts:
        rows = [
            [
                Cell(f"r{i}" if i else "start"),
                _step_cell(attempt.get("step")),
                Cell(_when(attempt.get("time")), nowrap=True),
                Cell(str(attempt.get("world_size", ""))),
                Cell(str(attempt.get("host", ""))),
                Cell(str((attempt.get("slurm") or {}).get("SLURM_JOB_ID", ""))),
            ]
            for i, attempt in enumerate(attempts)
        ]
        head = ["start", "after step", "time", "processes", "host", "SLURM job"]
        blocks.append(Table(head, rows))
    if not blocks:
        blocks.append(Notes([Note("info", "The run was not started yet.")]))
    return Section("history", "Changes and restarts", blocks)


def _config(record: RunRecord, defaults: dict[str, Any]) -> Section:
    rows = [
        [Cell(key), Cell(shown(value)), Cell(shown(defaults[key]) if key in defaults else "–")]
        for key, value in record.config.items()
        if key not in FOLDER_KEYS and not (key in defaults and defaults[key] == value)
    ]
    blocks: list[Block] = [
        Table(["key", "this run", "default"], rows)
        if rows
        else Notes([Note("info", "No key differs from its default.")])
    ]
    if record.config_text:
        blocks.append(Code(record.config_text, summary="config.yaml"))
    intro = "The keys that differ from those of a command without overrides."
    return Section("config", "Config", blocks, intro)


def _provenance(record: RunRecord) -> Section:
    pairs = provenance_pairs(record)
    rows = [[Cell(name), Cell(text)] for name, text in pairs]
    nothing = Notes([Note("info", "provenance.json is missing or cannot be read.")])
    return Section("provenance", "Provenance", [Table([], rows) if rows else nothing])


def shown(value: Any) -> str:
    """Return a value of a config as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _step_cell(step: Any) -> Cell:
    return Cell(f"{step:,}", step) if type(step) is int else Cell("–")


def _when(seconds: Any) -> str:
    """Return a time since the epoch as local time; an empty text where it is none."""
    if not isinstance(seconds, int | float):
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return ""
