"""`metrics.jsonl`: one JSON object a row, each with its `step`."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, TypeAlias

from lunaris.atomic_files import replace_file

_log = logging.getLogger(__name__)

# `step`, and metrics by name: a number, a list of numbers, or None for one that is not finite.
Row: TypeAlias = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a metrics file in order, without lines that cannot be read."""
    return read_rows_and_damage(path)[0]


def read_rows_and_damage(path: Path) -> tuple[list[Row], list[tuple[int, bytes]]]:
    """Return the rows of a metrics file and its damaged lines with their numbers.

    A last line that a crash cut short is neither.
    """
    if not path.is_file():
        return [], []
    rows: list[Row] = []
    damaged: list[tuple[int, bytes]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = _row(line)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n") and line.strip():
                damaged.append((number, line))
    return rows, damaged


def rows_from(path: Path, offset: int) -> tuple[list[Row], int]:
    """Return the rows of a metrics file from byte `offset` on, and the offset after the last one.

    A line that is still being written is left for the next call.
    """
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    found = (_row(line) for line in whole.splitlines())
    return [row for row in found if row is not None], offset + len(whole)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    fits = all(isinstance(value, int | float | list | None) for value in row.values())
    return row if fits else None


def kept_rows(path: Path, resume_step: int) -> list[Row]:
    """Return the rows of a metrics file that a run which resumes from a checkpoint keeps.

    resume_step: the step of the checkpoint. With 0 there is none: the run starts over, and no row
    is kept.
    """
    return [row for row in read_rows(path) if row["step"] <= resume_step and resume_step]


def scalars(row: Row) -> dict[str, float]:
    """Return the numbers of a row by their names, without its step, lists and missing values."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def expert_shares(row: Row) -> dict[str, list[float]]:
    """Return each layer's shares of the experts as NAME_chart, in a row with a validation loss."""
    if "val/loss" not in row:
        return {}
    return {
        f"{name}_chart": value
        for name, value in row.items()
        if name.startswith("moe/") and name.endswith("/load")
    }


class MetricsFile:
    """Appends rows to a metrics file, after cutting those that a resumed run writes again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the rows that `kept_rows` returns.

        Lines that cannot be read are moved to `metrics.jsonl.damaged`, with a warning.
        """
        _, damaged = read_rows_and_damage(path)
        kept = kept_rows(path, resume_step)
        if damaged and resume_step:
            aside = path.with_name(f"{path.name}.damaged")
            with aside.open("ab") as file:
                file.writelines(line for _, line in damaged)
            numbers = ", ".join(str(number) for number, _ in damaged[:10])
            _log.warning("%s: line %s cannot be read; kept in %s", path, numbers, aside.name)
        if resume_step and not kept:
            _log.warning("%s: the rows up to step %d are lost", path, resume_step)
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
