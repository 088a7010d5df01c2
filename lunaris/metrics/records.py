"""`metrics.jsonl`: one JSON object a row, each with its `step`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TypeAlias

from lunaris.atomic_files import replace_file

# `step`, and metrics by name: a number, a list of numbers, or None for one that is not finite.
Row: TypeAlias = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a metrics file in order, without a last line that a crash cut short."""
    if not path.is_file():
        return []
    rows = []
    with path.open() as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


class MetricsFile:
    """Appends rows to a metrics file, after cutting those that a resumed run writes again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the rows up to `resume_step`, the step of the checkpoint that the run resumes from.

        With 0 there is no checkpoint: the run starts over, and no row is kept.
        """
        kept = [row for row in read_rows(path) if row["step"] <= resume_step and resume_step]
        replace_file(path, "".join(_line(row) for row in kept).encode())
        self._file = path.open("a")

    def append(self, row: Row) -> None:
        """Write one row; readers of the file see it at once."""
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Make the rows durable, as a checkpoint of the same step needs them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: Row) -> str:
    # JSON has no NaN and no infinity; with null instead, every reader can parse the row.
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(clean) + "\n"
