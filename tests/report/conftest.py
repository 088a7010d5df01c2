"""Run folders written by hand, and what a browser would find in a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.runs.run_dir import RunDir

CONFIG = """\
config_version: 3
name: x
model:
  max_seq_len: 16
moe:
  balancing: aux_loss
optimizer:
  learning_rate: 0.001
trainer:
  max_steps: 8
  grad_clip: 1.0
"""


@dataclass
class Parsed(HTMLParser):
    """The elements of a page, its visible text, its figures, and what its head declares."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    tables: list[list[list[str]]] = field(default_factory=list)
    _inside: str = ""
    _in_cell: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._inside == "figures":
            self.figures = json.loads(data)
        elif not self._inside:
            self.text += data
            if self._in_cell:
                self.tables[-1][-1][-1] += data.strip()

    def trace(self, chart: str, name: str | None = None, view: int = 0) -> dict[str, Any]:
        """Return a trace of a chart: the one of this name, or its only one."""
        traces = self.figures[chart]["views"][view]["traces"]
        (found,) = [trace for trace in traces if name in (None, trace.get("name"))]
        return dict(found)

    def points(self, chart: str, name: str | None = None) -> list[tuple[int, float | None]]:
        """Return the points of a line."""
        trace = self.trace(chart, name)
        return list(zip(trace["x"], trace["y"], strict=True))


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Return a function that writes a run's folder with these rows of metrics."""

    def make(
        path: str,
        rows: list[dict[str, Any]],
        *,
        config: str = CONFIG,
        extra: str = "",
        **status: Any,
    ) -> Path:
        folder = Path(path)
        (folder / "logs").mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines + extra)
        write_json(folder / "provenance.json", {"command": "lunaris train", "overrides": []})
        RunDir(folder).write_status(**({"state": "done", "step": 8, "max_steps": 8} | status))
        return folder

    return make


@pytest.fixture
def report_of() -> Callable[..., Parsed]:
    """Return a function that runs `lunaris report` and parses the page."""

    def report(*argv: str, to: str = "") -> Parsed:
        assert main(["report", *argv, *(["--to", to] if to else [])]) == 0
        parsed = Parsed()
        parsed.feed(Path(to or f"{argv[0]}/report.html").read_text())
        return parsed

    return report
