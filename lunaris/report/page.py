"""The HTML page: blocks of content, and the one file that holds them, the library and the data.

Blocks hold plain text; the template escapes all of it. Charts are figures of plotly.js, as JSON.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lunaris import __version__
from lunaris.atomic_files import replace_file
from lunaris.errors import UserError

NAME = "report.html"
# By this a file is known to be a report, which may be written again.
_MARK = f'<meta name="generator" content="lunaris report {__version__}">'
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class View:
    """One of the figures that a chart can show: traces of plotly.js, by a label to choose it.

    x: the title of the horizontal axis, where it is not that of the chart's layout.
    """

    label: str
    traces: list[dict[str, Any]]
    x: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure. caption: a sentence below it. wide: over the full width of the page.

    layout: of plotly.js, without colours, which the page adds.
    """

    kind: ClassVar[str] = "chart"
    id: str
    title: str
    views: list[View]
    layout: dict[str, Any]
    caption: str = ""
    wide: bool = False
    height: int = 300

    def figure(self) -> dict[str, Any]:
        """Return what the page's script draws."""
        return {
            "views": [
                {"label": view.label, "traces": view.traces, "x": view.x} for view in self.views
            ],
            "layout": self.layout,
            "height": self.height,
        }


@dataclass(frozen=True)
class Table:
    """A table. head: the titles of its columns; empty for a table of pairs.

    links: the address of a row's first cell, by the number of the row.
    """

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: list[list[Cell]]
    sortable: bool = False
    links: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What a table shows, and by which number it is sorted where it is one.

    nowrap: a text that stays on one line, like a time.
    """

    text: str
    number: float | None = None
    nowrap: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence about the run. level: `bad`, `warn`, `info` or `good`; remedy: what to do."""

    level: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Notes:
    """Sentences, the worst first."""

    kind: ClassVar[str] = "notes"
    notes: list[Note]


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a short text."""

    kind: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """A command, which the reader can copy, or a text as it is.

    summary: folds the text away. label: a line above it.
    """

    kind: ClassVar[str] = "code"
    text: str
    summary: str = ""
    command: bool = False
    label: str = ""


Block = Chart | Table | Notes | Facts | Code


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; intro: a sentence below it."""

    id: str
    title: str
    blocks: Sequence[Block]
    intro: str = ""

    def groups(self) -> list[list[Block]]:
        """Return the blocks with charts that follow each other as one group, for the grid."""
        found: list[list[Block]] = []
        for block in self.blocks:
            if found and block.kind == "chart" == found[-1][0].kind:
                found[-1].append(block)
            else:
                found.append([block])
        return found


@dataclass(frozen=True)
class Page:
    """A report. badge: a state, such as `done`."""

    title: str
    subtitle: str
    sections: list[Section]
    badge: str = ""

    def charts(self) -> list[Chart]:
        """Return the charts of all sections."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [block for block in blocks if isinstance(block, Chart)]


def render(page: Page) -> str:
    """Return the page as HTML that loads nothing, with the plotting library inside.

    Its content security policy lets the browser run these scripts only and reach no address.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {chart.id: chart.figure() for chart in page.charts()}
    return environment.get_template("page.html").render(
        page=page,
        mark=_MARK,
        nonce=secrets.token_hex(16),
        style=(_ASSETS / "style.css").read_text(),
        script=(_ASSETS / "charts.js").read_text(),
        library=get_plotlyjs() if figures else "",
        figures=_script_json(figures),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        version=__version__,
    )


def write(page: Page, path: Path) -> None:
    """Write the page to `path`. Raises UserError for a file that is no report, and a folder."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the report a file, such as {path / NAME}")
    if path.exists() and not _is_report(path):
        raise UserError(f"{path}: exists and is no report; choose another file by --to")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, render(page).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _MARK.rpartition(" ")[0].encode() in file.read(1024)
    except OSError:
        return False


def _script_json(value: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it ends the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
