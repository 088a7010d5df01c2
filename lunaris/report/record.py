"""What a report knows of a run: all files of its folder that people read. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lunaris.config.keys import flat
from lunaris.metrics.records import Row, read_rows_and_damage
from lunaris.runs.changes import Change, read_changes
from lunaris.runs.discovery import FoundRun
from lunaris.runs.facts import newest_facts
from lunaris.runs.run_dir import RunDir
from lunaris.runs.status import RunState, last_line, logs_of, resolve_states

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunRecord:
    """A run's files, read once.

    overrides: as given; of a sweep's point, those that not all points share. rows: of
    metrics.jsonl. damaged: the numbers of its lines that cannot be read. config: every key, flat
    and dotted. config_fault: what is wrong with config.yaml, or None. missing: whether the point
    has no folder.
    """

    path: Path
    name: str
    overrides: list[str]
    state: RunState
    rows: list[Row]
    damaged: list[int]
    config: dict[str, Any]
    config_text: str
    config_fault: str | None
    provenance: dict[str, Any]
    changes: list[Change]

    @property
    def missing(self) -> bool:
        return not self.path.is_dir()

    def scalars(self, key: str) -> tuple[list[int], list[float | None]]:
        """Return the steps at which a metric was logged, and its values.

        None stands for a value that is not finite; of a list, the largest element is taken.
        """
        steps, values = [], []
        for row in self.rows:
            if key in row:
                steps.append(row["step"])
                values.append(_number(row[key]))
        return steps, values

    def last(self, key: str) -> float | None:
        """Return the last value of a metric that is a finite number, or None."""
        return next((v for v in reversed(self.scalars(key)[1]) if v is not None), None)

    def best(self, key: str) -> tuple[int, float] | None:
        """Return the step and the value at which a metric is lowest, or None without any."""
        found = [(v, s) for s, v in zip(*self.scalars(key), strict=True) if v is not None]
        value, step = min(found, default=(None, 0))
        return None if value is None else (step, value)

    def highest(self, key: str) -> float | None:
        """Return the highest value of a metric that is a finite number, or None."""
        return max((v for v in self.scalars(key)[1] if v is not None), default=None)

    def val_loss(self) -> float | None:
        """Return the best validation loss: of the rows, else what status.json says, else None."""
        best = self.best("val/loss")
        written = self.state.status.get("best_val_loss")
        return best[1] if best else written

    def error(self) -> str:
        """Return why the run failed, or the last line of its log, or an empty string."""
        if self.state.remark:
            return self.state.remark
        return last_line(logs_of(self.path, self.state.status)) if not self.missing else ""


def read_records(found: Sequence[FoundRun]) -> list[RunRecord]:
    """Return the records of runs; SLURM is asked once for all of them."""
    states = resolve_states([run.path for run in found])
    return [_read(run, state) for run, state in zip(found, states, strict=True)]


def _read(run: FoundRun, state: RunState) -> RunRecord:
    run_dir = RunDir(run.path)
    rows, damaged = read_rows_and_damage(run_dir.metrics_path)
    tree, text, fault = _read_config(run_dir)
    return RunRecord(
        path=run.path,
        name=run.name,
        overrides=run.overrides,
        state=state,
        rows=rows,
        damaged=[number for number, _ in damaged],
        config=flat(tree),
        config_text=text,
        config_fault=fault,
        provenance=run_dir.read_provenance(),
        changes=read_changes(run.path),
    )


def _read_config(run_dir: RunDir) -> tuple[dict[str, Any], str, str | None]:
    """Return the tree and the text of config.yaml, and what is wrong with it.

    The file is read without the schemas: a report shows what it holds, also where this version
    would refuse it. The copy in the newest checkpoint takes the place of one that cannot be read.
    """
    text, fault, tree = "", None, None
    try:
        text = run_dir.config_path.read_text()
        tree = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        fault = "config.yaml is missing"
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        fault = f"config.yaml cannot be read: {' '.join(str(error).split())}"
    if isinstance(tree, dict):
        return tree, text, None
    fault = fault or "config.yaml holds no keys"
    facts = newest_facts(run_dir.checkpoints)
    if facts is None:
        return {}, text, fault
    shown = yaml.safe_dump(facts.config, sort_keys=False)
    return facts.config, shown, f"{fault}; shown is its copy in {facts.path.parent.name}"


def _number(value: Any) -> float | None:
    """Return a metric as one finite number, of a list its largest, or None."""
    numbers = value if isinstance(value, list) else [value]
    finite = [n for n in numbers if isinstance(n, int | float) and abs(n) < float("inf")]
    return max(finite, default=None)
