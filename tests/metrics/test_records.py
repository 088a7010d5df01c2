from __future__ import annotations

import json
from pathlib import Path

from lunaris.metrics.records import MetricsFile, read_rows


def test_rows_past_the_resumed_step_and_a_half_written_line_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "train/loss": 1 / s} for s in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 5, "tra')

    file = MetricsFile(path, resume_step=2)
    file.append({"step": 3, "train/loss": 0.25})
    file.close()

    assert read_rows(path) == rows[:2] + [{"step": 3, "train/loss": 0.25}]


def test_a_run_that_saved_nothing_starts_its_metrics_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val/loss": 4.0}\n{"step": 1, "train/loss": 3.9}\n')
    MetricsFile(path, resume_step=0).close()
    assert read_rows(path) == []


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.append({"step": 1, "train/grad_norm": float("inf"), "train/loss": float("nan")})
    file.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "train/grad_norm": null, "train/loss": null}\n'


def test_a_float_survives_the_file_bit_for_bit(tmp_path: Path) -> None:
    value = 2.718281828459045 / 3
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.append({"step": 1, "train/loss": value})
    file.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["train/loss"] == value
