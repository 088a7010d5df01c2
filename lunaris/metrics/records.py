"""`metrics.jsonl`: one JSON object a row, each with its `step`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lunaris.atomic_files import replace_file


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file in order; a last line cut short by a crash is left out."""
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
    """Appends rows to a metrics file, after cutting what a resumed run will write again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the rows up to `resume_step`, the checkpointed step that the run goes on from.

        Without one (0) the run begins anew, its first validation included.
        """
        kept = [row for row in read_rows(path) if row["step"] <= resume_step and resume_step]
        replace_file(path, "".join(_line(row) for row in kept).encode())
        self._file = path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; visible to readers at once."""
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Make the rows durable, as before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity; null keeps the row readable by everything.
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(clean) + "\n"
