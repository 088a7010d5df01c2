"""The charts as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lunaris.runs.run_dir import RunDir


def test_every_chart_of_a_run_is_a_picture(finished: RunDir, report_of: Callable[..., Any]) -> None:
    page = report_of(str(finished.path), "--png", "pictures")
    names = {path.stem for path in Path("pictures").glob("*.png")}
    assert names == set(page.figures) and "experts-layers" in names
    for path in Path("pictures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
